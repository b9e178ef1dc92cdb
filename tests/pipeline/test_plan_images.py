"""`plan` and `bench` on images: every family and tuner is counted, bytes are those stored, bad files are one line."""

from __future__ import annotations

import json
import shutil
from timeit import timeit

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.cost import disk, rates
from pipeline.cost.flops import counts, saved_bytes, step_operations, tuner_model
from pipeline.cost.rates import random_batch
from pipeline.cost.workload import workload
from pipeline.extract.pretrained import Checkpoint
from pipeline.recipe import Recipe
from pipeline.train.tuners import tuner_class, tuner_config
from tests import vision
from tests.pairs import IMAGES, SUITE, pairs
from tests.pipeline.test_errors import refused, run
from tests.train.conformance import Case, small_options


@pytest.mark.parametrize(("name", "tuner"), pairs({n: c for n, c in IMAGES.items() if n in SUITE}))
def test_operations_of_every_tuner_are_counted(name, tuner, checkpoints):
    backbone = Checkpoint(checkpoints[name], name).backbone
    lengths = backbone.measure(np.array([[64, 64], [64, 64], [96, 64]]))
    config = tuner_config(tuner, small_options(tuner))
    model, states = tuner_model(backbone, tuner, config), tuner_class(tuner, backbone).states(config, backbone)
    assert step_operations(backbone, lengths, states, model) > 0
    assert saved_bytes(backbone, tuner, config, lengths, 2) > 0


@pytest.mark.parametrize("name", [n for n in IMAGES if n in SUITE])
def test_operations_of_every_backbone_are_counted(name, checkpoints):
    backbone = Checkpoint(checkpoints[name], name).backbone
    lengths = backbone.measure(np.array([[64, 64], [64, 64], [96, 64]]))
    one = {stream: n[:1] for stream, n in lengths.items()}
    found, alone = counts(backbone, "probe", tuner_config("probe", {}), [lengths, one])
    assert found.backbone > 2 * alone.backbone > 0  # of three images the third is larger
    assert found.step > alone.step > 0


@pytest.mark.parametrize("name", [n for n in IMAGES if n in SUITE])
def test_a_made_up_batch_has_the_shapes_of_a_real_one(name, checkpoints, pictures):
    """Maps, lengths and states as a store gives them for images of the same extent."""
    case = Case(Checkpoint(checkpoints[name], name), "probe", pictures)
    real = case.batch()
    extents = np.array([p.extent for p in case.inputs.pictures])
    made = random_batch(case.backbone, case.backbone.measure(extents), list(real.states), 2, torch.device("cpu"))
    assert {k: v.shape for k, v in made.states.items()} == {k: v.shape for k, v in real.states.items()}
    assert all(torch.equal(made.columns[k], real.columns[k]) for k in real.columns)
    assert all(np.array_equal(made.lengths[s], n) for s, n in real.lengths.items())
    model = case.model()
    assert {k: v.shape for k, v in model(made).items()} == {k: v.shape for k, v in model(real).items()}


@pytest.fixture
def quick(monkeypatch):
    """Rates of everything real, each measured in a moment."""
    monkeypatch.setattr(disk, "DISK_SAMPLE", 1 << 20)
    monkeypatch.setattr(rates, "runs", lambda run, device, seconds=1.0, least=2: [timeit(run, number=1)])


def words(checkpoints, pictures, tmp_path, name, tuner="probe"):
    return ["--model", checkpoints[name], "--task", pictures, "--tuner", tuner, "--store", tmp_path / "store",
            "--device", "cpu", "--batch-size", 8]  # fmt: skip


@pytest.mark.parametrize(("name", "tuner"), [("vit", "sherl"), ("resnext", "unipt"), ("swin", "e3va")])
def test_planned_bytes_are_those_stored(checkpoints, pictures, tmp_path, quick, name, tuner):
    common = words(checkpoints, pictures, tmp_path, name, tuner)
    views = ["--views", 2]
    result = run("plan", *common, *views, "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["rates"]["image"] > 0 and plan["operations"]["ratio"] > 1 and not plan["estimated_lengths"]
    extract = run("extract", *common[:4], "--store", tmp_path / "store", "--for", tuner, *views, "--json")
    done = json.loads(extract.stdout)
    assert plan["samples"] == done["samples"]
    assert plan["formats"]["float16"]["total"] == pytest.approx(done["bytes"], rel=0.1)


def test_a_config_alone_is_enough(checkpoints, pictures, tmp_path):
    (tmp_path / "shape").mkdir()
    shutil.copy(checkpoints["swin"] / "config.json", tmp_path / "shape")
    recipe = Recipe(model=str(tmp_path / "shape"), task=str(pictures), tuner="e3va", device="cpu")
    assert workload(recipe).positions("train")["stage1"] == 16 * 16


def test_images_of_their_own_size_are_measured_by_their_headers(checkpoints, tmp_path):
    folder = vision.write_folder(tmp_path / "p", 12, side=64)
    for i, path in enumerate(sorted(folder.rglob("*.png"))[:4]):
        with Image.open(path) as image:
            image.resize((64, 32 + 32 * (i % 2))).save(path)
    recipe = Recipe(model=str(checkpoints["cifar"]), task=str(folder), tuner="probe", image_size="own", device="cpu")
    heights = np.concatenate([part["height"] for part in workload(recipe).lengths.values()])
    assert sorted(heights.tolist()) == [32] * 2 + [64] * 10


def test_bad_files_are_one_line(checkpoints, tmp_path):
    folder = vision.write_folder(tmp_path / "p", 12)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    for size in ([], ["--image-size", "own"]):
        refused(run("plan", *words(checkpoints, folder, tmp_path, "cifar"), *size), ".png")


@pytest.mark.parametrize(("name", "weights"), [("vit", False), ("resnet_hf", True), ("resnet_hf", False)])
def test_bench_measures_what_plan_predicts(checkpoints, pictures, tmp_path, quick, name, weights):
    model = tmp_path / "model"
    shutil.copytree(checkpoints[name], model)
    if not weights:
        (model / "model.safetensors").unlink()
    common = words({name: model}, pictures, tmp_path, name)
    result = run("bench", *common, "--limit", 24, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["compared"]
    assert found["bytes"]["ratio"] == pytest.approx(1, rel=0.15)
    assert {"extraction, s", "live epoch, s", "cached epoch, disk, s"} <= found.keys()
