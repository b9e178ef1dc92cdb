"""Live = cached: the same seed and order give the same losses, whatever the family, tuner and format."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from pipeline.commands.extract import run_extract
from pipeline.commands.train import run_train
from pipeline.recipe import Recipe
from pipeline.train.tuners import base, tuner_names
from tests.pairs import IMAGES, SUITE, TEXT, pairs

STEPS = 20
# Largest relative difference of a loss to the live one: of the first step (the direct effect of the format) and of any
# of the 20 (training amplifies it). float32 is the requirement, the others are stated bounds.
BOUNDS = {"float32": (1e-5, 1e-5), "float16": (1e-4, 1e-2), "bfloat16": (1e-3, 3e-2), "int8": (3e-3, 5e-2)}


def worst_of(cached: list[float], live: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(cached, live, strict=True))


def silent(text: str) -> None:
    pass


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in lines if "loss" in entry]


@pytest.fixture(scope="module")
def stores(tmp_path_factory, checkpoints, table, pictures):
    """(family, format) → a recipe whose states are in a store; extracted once a pair."""
    made: dict[tuple[str, str], dict] = {}

    def get(backbone: str, fmt: str) -> dict:
        if (backbone, fmt) not in made:
            options = {
                "model": str(checkpoints[backbone]), "task": str(table), "text": "first", "text_pair": "second",
                "label": "label", "store": str(tmp_path_factory.mktemp(f"{backbone}-{fmt}") / "store"), "format": fmt,
                "tuner_options": {"reduction": 4},
            }  # fmt: skip
            if backbone in IMAGES:
                options |= {"task": str(pictures), "text": None, "text_pair": None, "label": None}
            run_extract(Recipe(**options, tuners=tuple(tuner_names(SUITE[backbone]))), silent, quiet=True)
            made[backbone, fmt] = options
        return made[backbone, fmt]

    return get


def train_both(
    options: dict, tuner: str, folder: Path, steps: int = STEPS, **more: object
) -> tuple[list[float], list[float]]:
    common = {
        **options,
        "tuner": tuner,
        "batch_size": 16,
        "epochs": 5,
        "max_steps": steps,
        "warmup_ratio": 0.1,
        # SHERL's closed gate gives a tiny T5 gradients of norm 15,000 at first; until a run has left that, which some
        # seeds do later than others, rounding grows.
        "seed": 5,
        # At its own rate UniPT, which cuts its weights at zero, makes a rounding error grow within the steps.
        "lr": 1e-3 if tuner == "unipt" else None,
    }
    known = {f.name for f in fields(base.tuner_class(tuner).config_class)}
    common["tuner_options"] = {k: v for k, v in {**options["tuner_options"], **more}.items() if k in known}
    run_train(Recipe(**common, out=str(folder / "cached")), silent, quiet=True)
    run_train(Recipe(**common, live=True, out=str(folder / "live")), silent, quiet=True)
    return losses(folder / "cached"), losses(folder / "live")


# RoBERTa is run by the class that runs BERT, with other positions, and goes through the conformance suite as it does.
@pytest.mark.parametrize(
    ("backbone", "tuner"),
    [pytest.param(b, t, marks=[pytest.mark.matrix] if b == "roberta" else []) for b, t in pairs(SUITE)],
)
def test_float32_store_gives_the_live_losses(stores, tmp_path, backbone, tuner):
    steps = STEPS if backbone in TEXT else 8
    cached, live = train_both(stores(backbone, "float32"), tuner, tmp_path, steps)
    assert len(cached) == len(live) == steps
    assert worst_of(cached, live) <= BOUNDS["float32"][1]
    assert len(set(cached)) == steps  # it did train


@pytest.mark.parametrize("fmt", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("backbone", ["t5", "bert"])
def test_smaller_formats_stay_within_their_bound(stores, tmp_path, backbone, fmt):
    # From a closed gate a T5 makes any rounding grow ten-thousandfold, with some seeds: that says nothing of a format.
    cached, live = train_both(stores(backbone, fmt), "sherl", tmp_path, gate=0.1)
    first, all_ = BOUNDS[fmt]
    assert worst_of(cached[:1], live[:1]) <= first
    assert 0 < worst_of(cached, live) <= all_


@pytest.mark.parametrize("backbone", ["bert", "vit"])
def test_a_new_tuner_is_live_as_cached_by_being_registered(stores, tmp_path, monkeypatch, backbone):
    monkeypatch.setattr(base, "_TUNERS", dict(base._TUNERS))
    from tests.train import toy_tuner

    monkeypatch.setitem(base._TUNERS, "toy", toy_tuner.Toy)
    options = stores(backbone, "float32")
    run_extract(Recipe(**options | {"tuner_options": {}}, tuners=("toy",)), silent, quiet=True)
    cached, live = train_both(options, "toy", tmp_path, 4)
    assert len(cached) == 4 and worst_of(cached, live) <= BOUNDS["float32"][1]
