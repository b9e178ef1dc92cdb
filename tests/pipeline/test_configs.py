"""Every recipe in configs/ is one the command line takes, and asks for the network its header counts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, CLIPTextConfig, CLIPVisionConfig, T5Config, TimmWrapperConfig

from pipeline.cost import plan as planning
from pipeline.extract.backbones import backbone_for
from pipeline.extract.short_names import SHORT_NAMES
from pipeline.lookup.objective import class_objective
from pipeline.owners import config_of, recipe_of
from pipeline.recipe import read_recipe
from pipeline.train.features import Want
from pipeline.train.model import Model
from pipeline.train.objectives import Answers, objective_class
from pipeline.train.published import kept_layers
from pipeline.train.tuners import tuner_class, tuner_config
from tests.extract.test_tasks_masks import ade20k
from tests.objects import write_coco, write_voc
from tests.pipeline.test_errors import run
from tests.train.test_tuners import COUNTS, T5

ALL = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
CONFIGS = [path for path in ALL if "-t5-" in path.stem]


def test_one_recipe_a_row() -> None:
    assert {path.stem for path in CONFIGS} >= {f"{tuner}-{model}" for tuner, model in COUNTS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    values = read_recipe(path)
    recipe = recipe_of("train", ("recipe", {**values, "task": "rte"}))
    assert path.stem == f"{recipe.tuner}-{recipe.model}" and recipe.tuners == (recipe.tuner,)
    for command in ("extract", "train"):
        assert re.search(rf"^#   pipeline {command} +--recipe configs/{path.name} --task rte", text, re.M)
    backbone = backbone_for(T5Config(vocab_size=32128, **T5[recipe.model]))
    for stream in backbone.streams:  # the recipe writes out what is also the default
        assert list(recipe.tuner_options["layers"]) == kept_layers(recipe.tuner, backbone, stream)
    config = config_of(recipe, recipe.tuner)
    objective = class_objective(backbone, tuner_class(recipe.tuner), ((5, 1), (6, 1)))
    with torch.device("meta"):
        model = Model.build(recipe.tuner, config, backbone, backbone.tail(None, "sdpa"), objective)
    count = COUNTS[recipe.tuner, recipe.model]
    assert model.trainable_parameters() == count and f"Trainable parameters: {count:,} " in text


@pytest.mark.parametrize("size", ["base", "large"])
def test_recipe_of_e3va(size: str) -> None:
    (path,) = [p for p in ALL if p.stem == f"e3va-swin-{size}"]
    text = path.read_text(encoding="utf-8")
    recipe = recipe_of("train", ("recipe", {**read_recipe(path), "task": "pictures"}))
    assert recipe.tuner == "e3va" and recipe.tuners == ("e3va",) and recipe.model == f"swin-{size}"
    for command in ("extract", "train"):
        assert re.search(rf"^#   pipeline {command} +--recipe configs/{path.name} --task images", text, re.M)
    architecture = SHORT_NAMES[recipe.model].removeprefix("timm/").rpartition(".")[0]
    backbone = backbone_for(TimmWrapperConfig(architecture=architecture))
    for alpha in (8, 16, 32):
        config = tuner_config("e3va", {**recipe.tuner_options, "alpha": alpha})
        with torch.device("meta"):
            made = tuner_class("e3va", backbone)(config, backbone, backbone.tail(None, "sdpa"), Want())
        assert f"{sum(p.numel() for p in made.parameters()):,}" in text


# Bytes an image at 512 × 512 in float16 (methods §6.4, decimal): branches, stages and patch embedding; stages alone.
ADE20K = {"base": (33_315_990, 77.1e6, 7.86e6), "large": (36_953_238, 115.6e6, 11.8e6)}


@pytest.mark.parametrize("size", ["base", pytest.param("large", marks=pytest.mark.matrix)])
def test_recipe_of_masks_is_planned(size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(p for p in ALL if p.stem == f"e3va-upernet-swin-{size}-ade20k")
    text, (head, whole, pyramid) = path.read_text(encoding="utf-8"), ADE20K[size]
    for name, value in (("backbone_rate", 1e12), ("step_seconds", 0.1), ("decode_rate", 1e10)):
        monkeypatch.setattr(planning.measured, name, lambda *a, value=value: value)
    monkeypatch.setattr(planning.measured, "disk_rates", lambda *a: (1e9, 1e9, 1e9))
    architecture = SHORT_NAMES[f"swin-{size}"].removeprefix("timm/").rpartition(".")[0]
    (tmp_path / "model").mkdir()
    config = {"architecture": architecture, "num_classes": 0, "pretrained_cfg": {"input_size": [3, 384, 384]}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    more = {"model": str(tmp_path / "model"), "task": str(ade20k(tmp_path / "ade")), "device": "cpu"}
    recipe = recipe_of("train", ("recipe", {**read_recipe(path), **more, "batch_size": 1}))
    assert recipe.tuner_options["alpha"] == 8 and recipe.views == 2
    plan, said = planning.run_plan(recipe, (2 * 3 + 3) * 2 * pyramid, None)
    assert plan["parameters"]["head"] == head and f"{head:,} in the head" in text
    assert f"{plan['parameters']['tuner']:,} in the tuner" in text and f"{head:,} in the head" in said
    samples = plan["samples"]
    assert samples == 2 * 3 + 3 and plan["formats"]["float16, one view"]["total"] < plan["formats"]["float16"]["total"]
    assert plan["formats"]["float16"]["bytes a sample"] == pytest.approx(whole, rel=2e-3)
    assert plan["formats"]["float16, the pyramid alone"]["bytes a sample"] == pytest.approx(pyramid, rel=2e-3)
    assert plan["formats"]["int8"]["total"] < 0.6 * plan["formats"]["float16"]["total"]
    fits = list(plan["largest_batch"].values())
    assert list(plan["largest_batch"]) == ["11 GB", "16 GB", "24 GB", "32 GB"] and 0 < fits[0] < fits[1] < fits[3]
    assert "over the budget" in said and "the pyramid alone takes" in plan["recommendation"]
    assert "--for fixed" in plan["commands"][0] and "--live" in plan["commands"][2]


OBJECTS = [p for p in ALL if p.stem.endswith(("-voc", "-coco")) and p.stem.startswith("e3va-")]


@pytest.mark.matrix
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.stem)
def test_recipes_of_objects_are_planned(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("backbone_rate", 1e12), ("step_seconds", 0.1), ("decode_rate", 1e10)):
        monkeypatch.setattr(planning.measured, name, lambda *a, value=value: value)
    monkeypatch.setattr(planning.measured, "disk_rates", lambda *a: (1e9, 1e9, 1e9))
    coco, size = path.stem.endswith("-coco"), "large" if "large" in path.stem else "base"
    architecture = SHORT_NAMES[f"swin-{size}"].removeprefix("timm/").rpartition(".")[0]
    (tmp_path / "model").mkdir()
    config = {"architecture": architecture, "num_classes": 0, "pretrained_cfg": {"input_size": [3, 384, 384]}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    if coco:
        files = write_coco(tmp_path / "coco", {"train": 3, "val": 2})
        task = {"task": str(files["train"]), "data": str(files["train"].parents[1]), "validation": str(files["val"])}
    else:
        task = {"task": str(write_voc(tmp_path / "voc", {"train": 3, "val": 2}))}
    more = {"model": str(tmp_path / "model"), "device": "cpu", "batch_size": 1, **task}
    recipe = recipe_of("train", ("recipe", {**read_recipe(path), **more}))
    assert recipe.objective == ("instances" if coco else "detection") and recipe.views == 2
    assert config_of(recipe, "e3va") == tuner_config("e3va", {"alpha": 8})
    plan, _ = planning.run_plan(recipe, None, None)
    assert plan["samples"] == 2 * 3 + 2 and plan["formats"]["float16"]["total"] > 0
    text = path.read_text(encoding="utf-8")
    assert f"in the tuner: {'1,195,008' if size == 'base' else '1,792,512'};" in text


def test_there_is_a_recipe_for_each_row_of_objects() -> None:
    heads = {"voc": "retinanet", "coco": "cascade-mask-rcnn"}
    assert {p.stem for p in OBJECTS} == {f"e3va-{h}-swin-{s}-{d}" for d, h in heads.items() for s in ("base", "large")}
    for path in OBJECTS:
        recipe = recipe_of("train", ("recipe", {**read_recipe(path), "task": "any"}))
        assert heads[path.stem.rpartition("-")[2]] == recipe.objective_options["head"]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_commented_choices_are_options_too(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"# (\w+: +\S+) +#", line):
            name, value = (part.strip() for part in found[1].split(":"))
            words = name in ("format", "init")
            typed = value if words else float(value) if "." in value else int(value)
            recipe_of("train", ("recipe", {**read_recipe(path), name: typed}))


RETRIEVAL = [path for path in ALL if "-vse-" in path.stem or "-clip4clip-" in path.stem]


# One of each system in the quick suite; the others differ in their data set.
QUICK = {"sherl-vse-flickr30k", "unipt-vse-coco", "sherl-clip4clip-msrvtt", "unipt-clip4clip-msvd"}
PLANNED = [pytest.param(p, id=p.stem, marks=[] if p.stem in QUICK else pytest.mark.matrix) for p in RETRIEVAL]


@pytest.mark.parametrize("path", PLANNED)
def test_recipes_of_retrieval_are_parsed_and_planned(path: Path, tmp_path: Path) -> None:
    """Both commands of the header as they stand; counts on the meta device; bytes from configurations alone."""
    text = path.read_text(encoding="utf-8")
    vse, (tuner, _, data) = "-vse-" in path.stem, path.stem.split("-")
    models = write_models(tmp_path, vse)
    write_pairs(tmp_path, data)
    lines = re.findall(r"^#   pipeline (extract|train) +--recipe (\S+)(.*)", text, re.M)
    assert [command for command, *_ in lines] == ["extract", "train"] and {at for _, at, _ in lines} == {
        f"configs/{path.name}"
    }
    words = [str(tmp_path / w) if (tmp_path / w).exists() else w for w in lines[1][2].split()]
    words = [w for w in words if not w.startswith("video=VISION")]
    words = [w for w in words if w != "--model"] + ["--model", models]
    done = run("plan", "--recipe", path, *words)
    assert done.exit_code == 0, done.output
    told = json.loads(run("plan", "--recipe", path, *words, "--json").stdout)
    slots, image = told["slots"], "image" if vse else "video"
    assert slots.keys() == {image, "text"} and slots[image]["samples"] < slots["text"]["samples"]
    size = slots[image]["bytes a sample"]["float16"]
    if tuner == "sherl" and vse:  # 16 × 16 cells of 256 + 512 + 1024 + 2048 channels: 2 MB instead of 16
        assert size == pytest.approx(256 * 3840 * 2, rel=1e-3)
    elif vse:
        assert 15e6 < size < 17e6
    else:  # 12 frames of 50 tokens in 13 states: 12 MB, and 108 GB for 9,000 videos
        assert size == pytest.approx(12 * 50 * 768 * 13 * 2, rel=1e-3) and 9000 * size == pytest.approx(108e9, rel=0.01)
    assert f"Trainable parameters: {parameters(path, tuner, vse):,}" in text


def parameters(path: Path, tuner: str, vse: bool) -> int:
    values = {**read_recipe(path), "task": "a.csv", "model": "image=a,text=b"}
    recipe = recipe_of("train", ("recipe", values))
    config, joint = config_of(recipe, recipe.tuner), recipe.objective_options["joint_width"]
    total = 0
    features = {}
    for slot, shape in (RESNEXT_BERT if vse else CLIP_TOWERS).items():
        backbone = backbone_for(shape)
        with torch.device("meta"):
            made = tuner_class(recipe.tuner, backbone)(config, backbone, backbone.tail(None, "sdpa"), Want(joint=joint))
        total += sum(p.numel() for p in made.parameters())
        features |= {f"{slot}/{name}": feature for name, feature in made.features.items()}
    objective = objective_class(recipe.objective or "")
    options = dict(recipe.objective_options)
    made_objective = objective(objective.config_class(**options), Answers(slots=tuple(RESNEXT_BERT)))
    head = made_objective.head(features, None)  # type: ignore[arg-type]
    return total + sum(p.numel() for p in head.parameters())


RESNEXT_BERT = {"image": TimmWrapperConfig(architecture="resnext101_32x8d"), "text": BertConfig()}
CLIP_TOWERS = {
    "image": CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=32,
        projection_dim=512, architectures=["CLIPVisionModelWithProjection"],
    ),
    "text": CLIPTextConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, projection_dim=512,
        architectures=["CLIPTextModelWithProjection"],
    ),
}  # fmt: skip


def write_models(folder: Path, vse: bool) -> str:
    """Folders with a config.json alone, which is all that planning needs."""
    slots = {"image" if vse else "video": "image", "text": "text"}
    for slot, kind in slots.items():
        (folder / slot).mkdir()
        shape = (RESNEXT_BERT if vse else CLIP_TOWERS)[kind]
        raw = {**shape.to_dict(), "model_type": shape.model_type}
        if vse and kind == "image":
            raw = {"architecture": "resnext101_32x8d", "num_classes": 1000, "num_features": 2048}
            raw["pretrained_cfg"] = {"input_size": [3, 224, 224]}
        (folder / slot / "config.json").write_text(json.dumps(raw, default=str))
    return ",".join(f"{slot}={folder / slot}" for slot in slots)


def write_pairs(folder: Path, data: str) -> None:
    """A few pairs in the data set's own files; the images and frames themselves are not needed."""
    if data in ("flickr30k", "coco"):
        said = [{"raw": f"a dog runs {k}"} for k in range(5)]
        images = [
            {"filename": f"{i}.jpg", "split": s, "sentences": said} for i, s in enumerate(("train", "val", "test"))
        ]
        for image in images:
            image["sentences"] = [{"raw": f"{s['raw']} {image['split']}"} for s in said]  # type: ignore[index]
        (folder / f"dataset_{data}.json").write_text(json.dumps({"images": images}))
    elif data == "msrvtt":
        rows = [{"video_id": f"video{i}", "caption": f"a man {i} {k}"} for i in range(12) for k in range(2)]
        (folder / "MSRVTT_data.json").write_text(json.dumps({"videos": [], "sentences": rows}))
        (folder / "MSRVTT_JSFUSION_test.csv").write_text("video_id,sentence\nvideo0,a man runs\n")
    else:
        (folder / "MSVD").mkdir()
        lines = [f"v{i} a cat {i} {k}" for i in range(3) for k in range(3)]
        (folder / "MSVD" / "AllVideoDescriptions.txt").write_text("\n".join(lines))
        for i, split in enumerate(("train", "val", "test")):
            (folder / "MSVD" / f"{split}_list.txt").write_text(f"v{i}\n")
