"""Every recipe in configs/ is one the command line takes, and asks for the network its header counts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import T5Config, TimmWrapperConfig

from pipeline.extract.backbones import backbone_for
from pipeline.extract.short_names import SHORT_NAMES
from pipeline.lookup.objective import class_objective
from pipeline.owners import config_of, recipe_of
from pipeline.recipe import read_recipe
from pipeline.train.features import Want
from pipeline.train.model import Model
from pipeline.train.published import kept_layers
from pipeline.train.tuners import tuner_class, tuner_config
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


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_commented_choices_are_options_too(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"# (\w+: +\S+) +#", line):
            name, value = (part.strip() for part in found[1].split(":"))
            words = name in ("format", "init")
            typed = value if words else float(value) if "." in value else int(value)
            recipe_of("train", ("recipe", {**read_recipe(path), name: typed}))
