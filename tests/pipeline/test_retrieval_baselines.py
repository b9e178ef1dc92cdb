"""Baselines in two towers: what trains inside one backbone or both, beside tuners in one table; what is refused."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.test_errors import refused
from tests.pipeline.test_errors import run as invoke
from tests.pipeline.test_objectives import run
from tests.pipeline.test_retrieval import captioned, write
from tests.pipeline.test_slots import losses

FAST = ["--objective", "hinge", "--batch-size", 8, "--joint-width", 16, "--device", "cpu", "--epochs", 2]


@pytest.fixture(scope="module")
def made(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Pairs through a vision transformer and a text encoder."""
    folder = tmp_path_factory.mktemp("towers")
    table = write(folder / "captions.csv", captioned(folder / "images", 12))
    options = ["--model", f"image={checkpoints['vit']},text={checkpoints['bert']}", "--task", table]
    options += ["--image", "image", "--text", "caption", "--data", folder / "images"]
    stored = [*options, "--store", folder / "store"]
    run("extract", *stored, "--for", "probe,unipt-vse", "--format", "float32")
    return {"options": options, "stored": stored, "folder": folder}


def test_tuners_and_baselines_in_one_table(made: dict[str, Any], tmp_path: Path) -> None:
    methods = ["probe", "full", "image=probe+text=lora", "image=partial-1+text=unipt-vse"]
    told = run("compare", *made["stored"], *FAST, "--tuners", ",".join(methods), "--out", tmp_path / "runs")
    rows = {row["method"]: row for row in told["rows"]}
    assert list(rows) == methods and [row["live"] for row in rows.values()] == [False, True, True, True]
    heads = rows["probe"]["trainable"]
    assert rows["full"]["trainable"] == heads + told["backbone_parameters"]
    assert heads < rows["image=probe+text=lora"]["trainable"] < rows["full"]["trainable"]
    assert all(row["figure"] == "rsum" and 0 < row["metric"] <= 600 for row in rows.values())
    assert "image: the last block; text: unipt-vse" in rows[methods[-1]]["settings"]
    whole = {row["method"]: row["memory_bytes"] for row in told["rows"]}
    assert whole["probe"] < whole["image=probe+text=lora"] < whole["full"]


@pytest.mark.parametrize("method", ["image=probe+text=adapter", "image=bitfit+text=unipt-vse"])
def test_the_frozen_tower_is_read_from_the_store(made: dict[str, Any], tmp_path: Path, method: str) -> None:
    """And gives the losses of a run with both backbones in the loop, in the same order of samples."""
    how = [*made["stored"], *FAST, "--tuners", method]
    run("compare", *how, "--out", tmp_path / "cached")
    run("compare", *how, "--live", "--out", tmp_path / "live")
    one, other = (losses(tmp_path / name / f"{method}-s0") for name in ("cached", "live"))
    assert len(one) == 8 and one == pytest.approx(other, abs=1e-4)


def test_without_a_store_both_train_live(made: dict[str, Any], tmp_path: Path) -> None:
    how = [*made["options"], *FAST, "--store", tmp_path / "none", "--out", tmp_path / "runs"]
    (row,) = run("compare", *how, "--tuners", "image=norm-tuning+text=prompt")["rows"]
    assert row["live"] and not (tmp_path / "none").exists()
    refused(
        invoke("compare", *how, "--tuners", "image=probe+text=lora"), "pipeline extract", "--for image=probe,text=probe"
    )
    several = "image=probe+text=lora,probe,image=lora+text=unipt-vse"
    refused(invoke("compare", *how, "--tuners", several), "pipeline extract", " --for probe,text=unipt-vse --device")


@pytest.mark.parametrize(
    ("tuners", "next_one"),
    [
        ("probe,unipt-vse,image=probe,text=probe", "--tuner probe"),  # as a refused comparison prints it
        ("image=probe,image=unipt-vse,text=unipt-vse", "--tuner image=probe,text=unipt-vse"),
        ("text=probe,unipt-vse", "--tuner image=unipt-vse,text=probe"),
    ],
)
def test_an_extraction_for_some_slots_tells_a_training_that_works(
    made: dict[str, Any], tmp_path: Path, tuners: str, next_one: str
) -> None:
    options = [*made["options"], "--store", tmp_path / "store"]
    done = invoke("extract", *options, "--for", tuners)
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("next: pipeline train")]
    assert f" {next_one}" in line and line.count("--tuner") == 1
    trained = invoke(*shlex.split(line.removeprefix("next: pipeline ")), *FAST, "--out", tmp_path / "run")
    assert trained.exit_code == 0, trained.output


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ("image=lora", ["image=lora", "name the tuner of slot text too"]),
        ("picture=lora+text=lora", ["no slot picture", "image, text"]),
        ("image=lorra+text=lora", ["unknown 'lorra'"]),
        ("image=prompt+text=lora", ["slot image", "prompt", "read no tokens"]),
    ],
)
def test_methods_that_are_refused(made: dict[str, Any], tmp_path: Path, methods: str, words: list[str]) -> None:
    how = [*made["stored"], *FAST, "--tuners", methods, "--out", tmp_path / "runs"]
    refused(invoke("compare", *how), *words)
    assert not (tmp_path / "runs").exists()


def test_a_baseline_that_one_tower_has_no_place_for_is_offered_on_the_other(
    checkpoints: dict[str, Path], made: dict[str, Any], tmp_path: Path
) -> None:
    how = [*made["options"], "--store", tmp_path / "none", *FAST, "--out", tmp_path / "runs"]
    how[1] = f"image={checkpoints['cifar']},text={checkpoints['bert']}"
    for method, offered in (("lora", "image=probe+text=lora"), ("prompt", "image=probe+text=prompt")):
        line = refused(invoke("compare", *how, "--tuners", f"full,{method}"), "slot image", offered)
        assert line.count("slot image") == 1
    line = refused(invoke("compare", *how, "--tuners", "image=lora+text=lora"), "slot image", "no attention")
    assert "=probe" not in line and not (tmp_path / "runs").exists()
    how[1] = f"image={checkpoints['cifar']},text={checkpoints['cifar']}"
    assert "=probe" not in refused(invoke("compare", *how, "--tuners", "lora"))
