"""Images from the command line: real shapes, views, bad files, supplements, and networks with real weights."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from pipeline.cli.main import main
from pipeline.store import Store
from tests import vision


def run(*words, ok: bool = True):
    result = CliRunner().invoke(main, [*map(str, words), "--json"])
    assert (result.exit_code == 0) == ok, result.output
    return json.loads(result.stdout) if ok else result.stderr


def clip_base(folder):
    torch.manual_seed(0)
    model = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, patch_size=32)
    )
    return vision._hugging_face(folder, model, 224)


SHAPES = {
    "swin-t": (lambda f: vision._timm(f, "swin_tiny_patch4_window7_224", 224), "e3va"),
    "vit-s": (lambda f: vision._timm(f, "vit_small_patch16_224", 224), "sherl"),
    "resnext-50": (lambda f: vision._timm(f, "resnext50_32x4d", 224), "sherl"),
    "clip": (clip_base, "unipt-clip"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_real_shapes_run_from_the_command_line(tmp_path, shape):
    make, tuner = SHAPES[shape]
    pictures = vision.write_folder(tmp_path / "pictures", 16)
    common = ["--model", make(tmp_path / "model"), "--task", pictures, "--store", tmp_path / "store"]
    # The architectures as they are, at 96 pixels a side to be quick.
    extract = ["--image-size", 96, "--for", tuner]
    done = run("extract", *common, *extract)
    assert done["computed"] == 16
    assert run("extract", *common, *extract)["computed"] == 0
    trained = run("train", *common, "--tuner", tuner, "--epochs", 1, "--batch-size", 7, "--out", tmp_path / "run")
    assert trained["steps"] == 2 and trained["test"]
    found = run("predict", tmp_path / "run", "--input", pictures / "left")
    assert found["rows"] == 8 and {p["label"] for p in found["predictions"]} <= {"left", "upper"}


def test_a_small_network_learns_and_predicts_what_it_learned(tmp_path, checkpoints, pictures):
    common = ["--model", checkpoints["cifar"], "--task", pictures, "--store", tmp_path / "store"]
    run("extract", *common, "--for", "sherl,unipt,probe")
    trained = run("train", *common, "--tuner", "unipt", "--epochs", 25, "--batch-size", 16, "--out", tmp_path / "run")
    assert trained["test"]["accuracy"] == 1.0
    found = run("predict", tmp_path / "run", "--input", pictures / "upper")["predictions"]
    assert sum(p["label"] == "upper" for p in found) >= 28 and all(0.5 <= p["probability"] <= 1 for p in found)
    assert {p["id"] for p in found} == {p.name for p in (pictures / "upper").iterdir()}
    assert run("evaluate", tmp_path / "run")["accuracy"] == 1.0


def test_views_are_stored_under_keys_of_their_own(tmp_path, checkpoints, pictures):
    common = ["--model", checkpoints["cifar"], "--task", pictures, "--store", tmp_path / "store", "--for", "probe"]
    done = run("extract", *common, "--views", 3, "--view-seed", 5)
    assert done["computed"] == 3 * 48 + 12 and done["rows"] == {"train": 144, "validation": 6, "test": 6}
    assert run("extract", *common, "--views", 2, "--view-seed", 5)["computed"] == 0  # a prefix of the same views
    assert run("extract", *common)["computed"] == 60  # another policy is another space
    spaces = Store.open(tmp_path / "store").spaces()
    assert len({s.identity["views"] for s in spaces}) == 2
    train = [
        *common[:-2],
        "--tuner",
        "probe",
        "--epochs",
        1,
        "--space",
        next(s for s in spaces if "seed 5" in s.identity["views"]).id,
    ]
    cached = run("train", *train, "--out", tmp_path / "cached")
    live = run("train", *train, "--live", "--out", tmp_path / "live")
    assert cached["validation"] == live["validation"]


def test_bad_files_stop_extraction_or_are_counted(tmp_path, checkpoints):
    folder = vision.write_folder(tmp_path / "pics", 20)
    (folder / "left" / "zzz.png").write_bytes(b"no image")
    Image.new("L", (8, 8)).save(folder / "upper" / "gray.png")
    common = ["--model", checkpoints["cifar"], "--task", folder, "--store", tmp_path / "store", "--for", "probe"]
    said = run("extract", *common, ok=False)
    assert ".png: " in said and "--skip-bad" in said
    done = run("extract", *common, "--skip-bad")
    assert sum(done["rows"].values()) == 20 and done["skipped"] == 2


def test_a_second_tuner_adds_only_what_is_missing(tmp_path, checkpoints, pictures):
    common = ["--model", checkpoints["cifar"], "--task", pictures, "--store", tmp_path / "store", "--format", "float32"]
    run("extract", *common, "--for", "probe")
    added = run("extract", *common, "--for", "probe,sherl")
    assert added["computed"] == 60
    more = vision.write_folder(tmp_path / "fewer", 10)  # some images of a segment are not at hand: stored anew
    run(
        "extract",
        "--model",
        checkpoints["cifar"],
        "--task",
        more,
        "--store",
        tmp_path / "store",
        "--format",
        "float32",
        "--for",
        "unipt",
    )
    run("train", *common[:-2], "--tuner", "sherl", "--epochs", 1, "--out", tmp_path / "run")
    space = Store.open(tmp_path / "store").spaces()[0]
    (segment,) = [s for s in space.segments() if s.base is None and len(s) == 60]
    names = {n for s in space.segments() if s.base == segment.id for n in s.states}
    assert names == {"stage1.2", "stage2.2", "stage3.1"}


def test_a_table_of_file_names(tmp_path, checkpoints, pictures):
    lines = ["file,side"] + [
        f"{p.relative_to(pictures).as_posix()},{p.parent.name}" for p in sorted(pictures.rglob("*.png"))
    ]
    (pictures / "names.csv").write_text("\n".join(lines))
    common = ["--model", checkpoints["vit"], "--task", pictures / "names.csv", "--text", "file", "--label", "side",
              "--store", tmp_path / "store"]  # fmt: skip
    try:
        assert run("extract", *common, "--for", "probe")["computed"] == 60
        run("train", *common, "--tuner", "probe", "--epochs", 1, "--out", tmp_path / "run")
        assert run("predict", tmp_path / "run", "--input", pictures / "names.csv")["rows"] == 60
    finally:
        (pictures / "names.csv").unlink()


@pytest.mark.parametrize("tuner", ["probe", "sherl", "unipt"])
def test_real_networks_transfer_to_remapped_classes(tmp_path_factory, shared_data, tuner):
    base = tmp_path_factory.getbasetemp() / "real-cifar"
    if not base.exists():
        pairs = {label: f"pair{label % 5}" for label in range(10)}
        vision.unpack_cifar(shared_data / "cifar10", base / "task" / "train", pairs, 0, 600)
        vision.unpack_cifar(shared_data / "cifar10", base / "task" / "test", pairs, 3000, 3200)
        vision.cifar(base / "resnet20", 20, shared_data / "weights" / "resnet20-12fca82f.th")
    common = ["--model", base / "resnet20", "--task", base / "task", "--store", base / "store"]
    run("extract", *common, "--for", "probe,sherl,unipt")
    trained = run("train", *common, "--tuner", tuner, "--epochs", 8, "--out", base / tuner)
    assert trained["test"]["accuracy"] > 0.8  # the largest class has 0.24
