"""Plan: bytes agree with what is stored, a config.json is enough, recommendations follow from the figures."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import wraps
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.commands.extract import run_extract
from pipeline.cost import plan as planning
from pipeline.cost.advice import split_limit
from pipeline.cost.flops import counts, saved_bytes, step_operations, tuner_model
from pipeline.cost.known_shapes import known_config
from pipeline.cost.plan import predict, run_plan
from pipeline.cost.rates import Rates, random_batch
from pipeline.cost.workload import Workload, workload
from pipeline.extract.backbones import backbone_for
from pipeline.extract.pretrained import Checkpoint
from pipeline.lookup.objective import class_objective
from pipeline.recipe import Recipe
from pipeline.store.errors import UserError
from pipeline.train.model import Model
from pipeline.train.tuners import tuner_class, tuner_config
from tests.pairs import TEXT, pairs
from tests.train.conformance import small_options

FAST = Rates(backbone=1e9, extraction=1e9, step=0.01, decode=1e9, disk_write=1e9, disk_warm=1e9, disk_cold=1e9)


COUNTED = {}


def counted_once(function):
    """`function` of a workload, a batch or lengths, counted anew only for others than before: it takes a while."""

    @wraps(function)
    def known(backbone, *given):
        name = repr((function.__name__, backbone.config.to_dict(), given))
        if name not in COUNTED:
            COUNTED[name] = function(backbone, *given)
        return COUNTED[name]

    return known


@pytest.fixture
def no_measuring(monkeypatch):
    """Fixed rates: a plan must be right given the rates, whatever machine the tests run on. The operations of one batch
    are counted once."""
    monkeypatch.setattr(planning, "counts", counted_once(planning.counts))
    rates = FAST

    def use(new):
        nonlocal rates
        rates = new

    monkeypatch.setattr(planning.measured, "backbone_rate", lambda *a: rates.backbone)
    monkeypatch.setattr(planning.measured, "step_seconds", lambda *a: rates.step)
    monkeypatch.setattr(planning.measured, "decode_rate", lambda *a: rates.decode)
    monkeypatch.setattr(
        planning.measured, "disk_rates", lambda *a: (rates.disk_write, rates.disk_warm, rates.disk_cold)
    )
    return use


@pytest.mark.parametrize(("name", "tuner"), pairs(TEXT))
def test_operations_of_every_tuner_are_counted(name, tuner, checkpoints):
    backbone, config = Checkpoint(checkpoints[name], name).backbone, tuner_config(tuner, small_options(tuner))
    model, states = tuner_model(backbone, tuner, config), tuner_class(tuner, backbone).states(config, backbone)
    one, two = ({s: np.array([3, 5] * n) for s in backbone.streams} for n in (1, 2))
    found, twice = (step_operations(backbone, lengths, states, model) for lengths in (one, two))
    assert 0 < found < twice <= 2 * found


@pytest.mark.parametrize("name", TEXT)
def test_operations_of_every_backbone_are_counted(name, checkpoints):
    backbone = Checkpoint(checkpoints[name], name).backbone
    one, two = ({s: np.array([3, 5] * n) for s in backbone.streams} for n in (1, 2))
    found, twice = counts(backbone, "probe", tuner_config("probe", {}), [one, two])
    assert twice.backbone == 2 * found.backbone > 0 and found.step < twice.step


def recipe_for(model, table, tmp_path, **more):
    options = {"text": "first", "text_pair": "second", "label": "label", "store": str(tmp_path / "store")}
    return Recipe(model=str(model), task=str(table), device="cpu", batch_size=16, **{**options, **more})


@pytest.mark.parametrize(
    ("kind", "fmt"),
    [
        ("t5", "int8"),
        ("bert", "float16"),
        pytest.param("t5", "float16", marks=pytest.mark.matrix),
        pytest.param("bert", "int8", marks=pytest.mark.matrix),
    ],
)
def test_predicted_bytes_are_those_stored(kind, fmt, checkpoints, table, tmp_path, no_measuring):
    recipe = recipe_for(checkpoints[kind], table, tmp_path, tuner="lst", tuners=("lst",), format=fmt)
    plan = predict(workload(recipe), recipe)
    assert not plan.estimated_lengths
    report = run_extract(recipe, lambda line: None, quiet=True)
    assert plan.formats[fmt]["total"] == pytest.approx(report["bytes"], rel=0.05)


def test_a_config_alone_is_enough(checkpoints, table, tmp_path, no_measuring):
    folder = tmp_path / "shape"
    folder.mkdir()
    shutil.copy(checkpoints["t5"] / "config.json", folder)
    for given in (folder, folder / "config.json"):
        plan, text = run_plan(recipe_for(given, table, tmp_path), None, None)
        assert plan["estimated_lengths"]
        assert "estimated from words" in text
        assert "tail" not in text and "frozen live end" in text  # --tail is an option of SHERL's, and another thing
        json.dumps(plan)


def test_an_unknown_model_says_what_to_give(table, tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        workload(recipe_for("nobody/nothing", table, tmp_path))


@pytest.mark.parametrize(("rates", "pays"), [(FAST, True), (replace(FAST, backbone=1e18, decode=1e6), False)])
def test_it_says_whether_caching_pays(rates, pays, checkpoints, table, tmp_path, no_measuring):
    no_measuring(rates)
    plan, text = run_plan(recipe_for(checkpoints["bert"], table, tmp_path), None, None)
    assert plan["pays"] is pays
    assert ("caching does not pay" in text) is not pays
    assert ("--live" in plan["commands"][-1]) is not pays


@pytest.mark.parametrize("gain", [0.97, 1.03, 1.08])
def test_a_cache_that_is_no_faster_is_not_recommended(gain, checkpoints, table, tmp_path, no_measuring):
    """However soon its extraction would be paid back."""
    recipe = recipe_for(checkpoints["bert"], table, tmp_path, epochs=1000)
    work = workload(recipe)
    at_once = replace(
        FAST, backbone=1e18, extraction=1e18, decode=1e15, disk_write=1e15, disk_warm=1e15, disk_cold=1e15
    )
    no_measuring(at_once)
    bare = predict(work, recipe)
    steps, rows = bare.live_epoch, work.rows["train"]
    if gain > 1:
        operations = bare.operations["backbone a step"] * rows / work.batch_size
        no_measuring(replace(at_once, backbone=operations / (gain - 1) / steps))
    else:
        no_measuring(
            replace(at_once, decode=rows * work.sample_bytes("float16", "train", None) / (1 / gain - 1) / steps)
        )
    plan, text = run_plan(recipe, None, None)
    tier = plan["tier"]
    assert plan["live_epoch"] / plan["cached_epoch"][tier] == pytest.approx(gain, abs=0.005)
    assert plan["pays"] is (gain > 1.05) and ("live is as fast" in text) is (gain < 1.05)
    assert ("times faster" in text) is (gain > 1.05) and "1.0 times faster" not in text
    assert ("--live" in plan["commands"][-1]) is (gain < 1.05)
    if gain < 1.05:
        assert "sweeps" in plan["recommendation"]


def test_a_budget_chooses_the_format_or_fewer_rows(checkpoints, table, tmp_path, no_measuring):
    recipe = recipe_for(checkpoints["bert"], table, tmp_path)
    work = workload(recipe)
    sizes = {f: v["total"] for f, v in predict(work, recipe).formats.items()}
    assert predict(work, recipe, budget=sizes["float16"]).format == "float16"
    assert predict(work, recipe, budget=sizes["float16"] - 1).format == "int8"
    small = predict(work, recipe, budget=sizes["int8"] / 2)
    assert "--limit" in small.commands[0]
    assert "budget" in small.recommendation
    none = predict(work, recipe, budget=1)
    assert not none.commands  # and no --limit 0, which would be left out and store all
    assert "does not hold a row" in none.recommendation


@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize("fits", [1, 3, 5, 60, 138 * 3, 1000, 2767, 9999])
def test_the_limit_is_for_each_split(fits, views):
    rows = {"train": 2490, "validation": 138, "test": 139}
    limit = split_limit({**rows, "train": 2490 * views}, fits, views)

    def stored(limit: int) -> int:
        return sum(min(n, limit) * (views if split == "train" else 1) for split, n in rows.items())

    assert stored(limit) <= fits
    if limit < 2490:
        assert stored(limit + 1) > fits


def test_a_task_without_training_rows_has_targets_to_time(checkpoints, table, tmp_path):
    """A T5 step is timed on samples with a target's positions, which only training rows have."""
    recipe = recipe_for(checkpoints["t5"], table, tmp_path, split=("validation",), tuner="probe")
    batches = workload(recipe).training_batches()
    assert batches and all(lengths["decoder"].min() > 1 for _, lengths in batches)
    run_plan(recipe, None, None)  # a step of so many positions is timed


def test_too_little_memory_makes_smaller_batches(checkpoints, table, tmp_path, no_measuring):
    recipe = recipe_for(checkpoints["bert"], table, tmp_path)
    work = workload(recipe)
    need = predict(work, recipe).memory["total"]
    plan = predict(work, recipe, memory=need / 2)
    assert "--accumulate" in plan.commands[1]


def lengths(backbone, n=32):
    return {s: np.full(n, 70 if s == backbone.streams[0] else 2) for s in backbone.streams}


def test_operations_at_the_papers_shapes():
    """The two products of a plain encoder layer are 24 · n · D² and attention 4 · n² · D."""
    backbone = backbone_for(known_config("bert-base"))
    one = {"encoder": np.asarray([70])}
    (found,) = counts(backbone, "probe", tuner_config("probe", {}), [one])
    pooler = 2 * 768**2  # which the model also runs
    assert found.backbone == 12 * (24 * 70 * 768**2 + 4 * 70**2 * 768) + pooler
    t5 = backbone_for(known_config("t5-base"))
    assert counts(t5, "sherl", tuner_config("sherl", {}), [lengths(t5)])[0].ratio > 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_kept_is_that_of_the_real_step(checkpoints, dtype):
    """Computed on the meta device = counted on a real step."""
    backbone, config = Checkpoint(checkpoints["bert"], "bert").backbone, tuner_config("sherl", {})
    states = tuner_class("sherl").states(config, backbone)
    model = Model.build(
        "sherl",
        config,
        backbone,
        backbone.tail(None, "sdpa"),
        class_objective(backbone, tuner_class("sherl"), [()] * 2),
    ).train()
    batch = random_batch(backbone, lengths(backbone, 4), states, 2, torch.device("cpu"), dtype)
    given = (*model.parameters(), *model.tuner.tail.parameters(), *batch.states.values())
    known, kept = {t.untyped_storage().data_ptr() for t in given}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.loss(batch)
    found = saved_bytes(backbone, "sherl", config, lengths(backbone, 4), 2, dtype)
    assert found == pytest.approx(sum(n for n, _ in kept.values()), rel=0.25)


@pytest.mark.parametrize("samples", [40, 256, 4096])
def test_three_batches_stand_for_an_epoch_of_skewed_lengths(samples: int) -> None:
    lengths = np.random.default_rng(0).lognormal(2.3, 0.8, samples).astype(np.int64) + 2  # a few long, as in SST-2
    backbone = SimpleNamespace(writes_text=False, continues_text=False, modality="text", streams=("encoder",))
    rows = {"train": samples}
    work = Workload(backbone, "probe", None, [], 2, {"train": {"encoder": lengths}}, rows, 32, True, 1, False)  # type: ignore[arg-type]
    found = [(share, int(b["encoder"].sum())) for share, b in work.training_batches()]
    assert sum(share * size for share, size in found) == pytest.approx(32 * lengths.mean())
    assert samples < 256 or abs(sum(share for share, _ in found) - 1) < 0.2  # of 40 a batch of 32 alone is whole
