"""Every recipe in configs/ is one the command line takes, and asks for the network its header counts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import T5Config, TimmWrapperConfig

from pipeline.cost import plan as planning
from pipeline.extract.backbones import backbone_for
from pipeline.extract.short_names import SHORT_NAMES
from pipeline.lookup.objective import class_objective
from pipeline.owners import config_of, recipe_of
from pipeline.recipe import read_recipe
from pipeline.train.features import Want
from pipeline.train.model import Model
from pipeline.train.published import kept_layers
from pipeline.train.tuners import tuner_class, tuner_config
from tests.extract.test_tasks_masks import ade20k
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


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_commented_choices_are_options_too(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"# (\w+: +\S+) +#", line):
            name, value = (part.strip() for part in found[1].split(":"))
            words = name in ("format", "init")
            typed = value if words else float(value) if "." in value else int(value)
            recipe_of("train", ("recipe", {**read_recipe(path), name: typed}))
