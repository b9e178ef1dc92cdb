"""Projections: the mathematics, and a feature space of fewer channels from extraction to prediction."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from pipeline.commands.extract import run_extract
from pipeline.commands.recheck import recheck
from pipeline.commands.train import run_train
from pipeline.extract.projection import Moments, Projection, fit, orthogonal, parse_projection
from pipeline.recipe import Recipe
from pipeline.runs import load_run
from pipeline.store import Store, UserError
from pipeline.store.upkeep.repair import repair
from pipeline.train.tuners import tuner_class
from tests.pipeline.test_parity import losses, silent


def test_pca_rebuilds_what_lies_in_few_directions():
    g = torch.Generator().manual_seed(0)
    plane = torch.randn(3, 20, generator=g) * torch.tensor([[3.0], [2.0], [1.0]])
    x = torch.randn(500, 3, generator=g) @ plane + 5
    moments = Moments()
    for part in x.split(64):
        moments.add({"encoder.0": part})
    found = moments.pca(3)
    mean, basis = found.mean["encoder.0"], found.basis["encoder.0"]
    z = found.apply({"encoder.0": x})["encoder.0"]
    torch.testing.assert_close(z, (x - mean) @ basis, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.widened("encoder.0", z), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.widened("encoder.1", z), z)  # which is not projected
    torch.testing.assert_close(basis.T @ basis, torch.eye(3), rtol=0, atol=1e-5)
    assert (z.var(0).diff() < 0).all()  # the largest variance first
    again = Moments()
    again.add({"encoder.0": x})  # the same rows in one piece
    torch.testing.assert_close(again.pca(3).basis["encoder.0"], basis, rtol=0, atol=1e-5)


def test_orthogonal_directions_follow_from_the_seed():
    one, same, other = (orthogonal({"encoder.0": 16, "encoder.1": 16}, 4, seed) for seed in (1, 1, 2))
    basis = one.basis["encoder.1"]
    torch.testing.assert_close(basis.T @ basis, torch.eye(4), rtol=0, atol=1e-6)
    assert one.digest == same.digest != other.digest
    assert Projection.from_tensors(one.tensors()).digest == one.digest


@pytest.mark.parametrize("text", ["pca", "pca:0", "pca:x", "svd:4", "pca:16", "orthogonal:99"])
def test_what_is_no_projection(text):
    with pytest.raises(UserError, match="projection"):
        parse_projection(text, 16)


def test_too_few_rows_to_fit_on():
    with pytest.raises(UserError, match="more than 8 positions"):
        fit("pca", 8, 0, {"encoder.0": 16}, [{"encoder.0": torch.randn(8, 16)}])


@pytest.fixture(scope="module", params=["bert", "t5"])
def made(request, tmp_path_factory, checkpoints, table) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("projected")
    options = {
        "model": str(checkpoints[request.param]), "task": str(table), "text": "first", "text_pair": "second",
        "label": "label", "store": str(folder / "store"), "format": "float32", "projection": "pca:8",
    }  # fmt: skip
    run_extract(Recipe(**options, tuners=("sherl", "lst")), silent, quiet=True)
    return {**options, "tuner_options": {"reduction": 4}}, folder


def test_what_feeds_the_live_layer_stays_full(made):
    (space,) = Store.open(made[0]["store"]).spaces()
    (segment,) = space.segments()
    widths = {name: info.width for name, info in segment.states.items()}
    full = {n for n, w in widths.items() if w == 32}
    expected = {"encoder.3", "decoder.2", "decoder.3"} if "decoder.0" in widths else {"encoder.2", "encoder.3"}
    assert full == expected and {w for n, w in widths.items() if n not in full} == {8}


def test_a_second_extraction_goes_on_in_the_same_space(made):
    options, _ = made
    report = run_extract(Recipe(**{**options, "seed": 5}, tuners=("sherl",)), silent, quiet=True)
    assert report["computed"] == 0 and len(Store.open(options["store"]).spaces()) == 1


@pytest.mark.parametrize("tuner", ["sherl", "lst"])
def test_live_is_cached(made, tuner):
    options, folder = made
    common = {**options, "tuner": tuner, "batch_size": 16, "epochs": 2, "max_steps": 8, "warmup_ratio": 0.1, "lr": 1e-3}
    run_train(Recipe(**common, out=str(folder / tuner)), silent, quiet=True)
    run_train(Recipe(**common, live=True, out=str(folder / f"{tuner}-live")), silent, quiet=True)
    cached, live = losses(folder / tuner), losses(folder / f"{tuner}-live")
    assert len(cached) == 8
    assert max(abs(a - b) / abs(b) for a, b in zip(cached, live, strict=True)) <= 1e-5
    run = load_run(folder / tuner)
    assert len(run.predict([("a b", "c"), ("b", "a c")])) == 2


def test_recomputed_samples_agree(made):
    assert all(found["ok"] for found in recheck(Store.open(made[0]["store"]), 3, made[0]["model"], seed=0))


def test_a_guide_that_is_not_full_is_refused(made):
    options, folder = made
    with pytest.raises(UserError, match=r"would feed the live layer"):
        run_train(
            Recipe(
                **{**options, "tuner_options": {**options["tuner_options"], "layers": (0, 1)}}, out=str(folder / "no")
            ),
            silent,
            quiet=True,
        )


def test_a_tuner_that_reads_full_states_is_refused_before_anything_runs(made, monkeypatch):
    monkeypatch.setattr(tuner_class("lst"), "projects", False)
    with pytest.raises(UserError, match=r"lst reads full states, not pca:8"):
        run_extract(Recipe(**{**made[0], "tuners": ("lst",)}), silent, quiet=True)


def test_repair_keeps_the_fit(made, tmp_path):
    options, _ = made
    shutil.copytree(options["store"], tmp_path / "store")
    (source,) = (tmp_path / "store" / "weights").glob("*/source.json")
    source.write_bytes(source.read_bytes()[:-2] + b" }")
    assert repair(str(tmp_path / "store")).problems
    said: list[str] = []
    again = run_extract(
        Recipe(**{**options, "store": str(tmp_path / "store")}, tuners=("sherl",)), said.append, quiet=True
    )
    assert again["computed"] == 0 and not Store.open(tmp_path / "store").verify(deep=True)
    assert any("fitted on 96 samples" in line for line in said)


def test_the_command_that_is_offered_names_the_projection(made, tmp_path):
    options = {**made[0], "store": str(tmp_path / "store")}
    run_extract(Recipe(**options, tuners=("sherl",)), silent, quiet=True)
    bare = {k: v for k, v in options.items() if k not in ("format", "projection")}
    with pytest.raises(UserError, match=r"--format float32 --projection pca:8"):
        run_train(Recipe(**bare, tuner="lst", out=str(tmp_path / "no")), silent, quiet=True)
