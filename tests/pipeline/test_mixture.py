"""Several tasks in one run, from the command line: one tuner, a head and a score each."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipeline
from pipeline.store.errors import UserError
from pipeline.train.fit.loop import Training
from pipeline.train.objectives.regression import Regression
from tests import tiny
from tests.pipeline.test_errors import refused
from tests.pipeline.test_errors import run as invoke
from tests.pipeline.test_objectives import run
from tests.pipeline.test_slots import TRAIN, losses


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes in 60 rows, numbers in 30, several labels in 30."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = tiny.sentences(60)
    lines = {
        "animals": [f"{t},{'cat' if 'cat' in t else 'dog' if 'dog' in t else 'none'}" for t in texts],
        "lengths": [f"{t},{len(t) / 7:.3f}" for t in texts[:30]],
    }
    for name, rows in lines.items():
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return folder


def options(tables: Path, model: Path, store: Path) -> list[Any]:
    return ["--model", model, "--task", f"{tables / 'animals.csv'},{tables / 'lengths.csv'}", "--store", store]


@pytest.mark.parametrize(("backbone", "tuner"), [("bert", "sherl"), ("t5", "lst"), ("t5", "probe")])
def test_two_tasks(tables: Path, checkpoints: dict[str, Path], tmp_path: Path, backbone: str, tuner: str) -> None:
    """Cached is live; what is scored, told and resumed is of each task. A T5 has a prompt, and so a space, for each."""
    both = options(tables, checkpoints[backbone], tmp_path / "store")
    done = run("extract", *both, "--for", tuner, "--format", "float32")["tasks"]
    assert [d["task"] for d in done] == ["animals", "lengths"]
    assert (done[0]["space"] == done[1]["space"]) == (backbone == "bert")
    how = ["--tuner", tuner, *TRAIN]
    cached = run("train", *both, *how, "--out", tmp_path / "cached")
    live = run("train", *both, *how, "--live", "--out", tmp_path / "live")
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), abs=1e-4)
    scores = {"animals.accuracy", "lengths.pearson", "lengths.spearman", "average"}
    assert cached["test"].keys() == scores and cached["test"] == pytest.approx(live["test"], abs=1e-5)
    assert cached["steps"] == 2 * (3 + 2)
    found = run("evaluate", tmp_path / "cached")
    assert {k: found[k] for k in scores} == cached["test"]
    one = run("evaluate", tmp_path / "cached", "--task", "animals")
    assert one["accuracy"] == found["animals.accuracy"]
    assert found["average"] == pytest.approx(
        (one["average"] + run("evaluate", tmp_path / "cached", "--task", "lengths")["average"]) / 2
    )
    if backbone == "bert":  # without a store, in another order
        alone = run("train", *both[:-1], tmp_path / "nowhere", *how, "--live", "--out", tmp_path / "alone")
        assert alone["steps"] == cached["steps"] and not (tmp_path / "nowhere").exists()
    new = tmp_path / "new.csv"
    new.write_text("text\na cat sees\nthe old dog\n")
    told = run("predict", tmp_path / "cached", "--input", new, "--task", "animals")["predictions"]
    assert all(t["label"] in ("cat", "dog", "none") for t in told) and len(told) == 2
    number = run("predict", tmp_path / "cached", "--input", new, "--task", "lengths")["predictions"]
    assert all(isinstance(t["label"], float) for t in number)
    refused(invoke("predict", tmp_path / "cached", "--input", new), "several tasks", "animals, lengths")
    refused(invoke("evaluate", tmp_path / "cached", "--task", "else"), "animals, lengths")
    again = run("train", "--recipe", tmp_path / "cached" / "recipe.yaml", "--out", tmp_path / "again")
    assert losses(tmp_path / "again") == losses(tmp_path / "cached") and again["task"] == "animals, lengths"


def test_weights_metrics_and_reports_of_each_task(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Weights are counted on each task's own rows; the recipe asks for them again, for one value is true of neither."""
    texts = tiny.sentences(60)
    for name, word in (("cats", "cat"), ("birds", "bird")):
        rows = [f"{text},{'yes' if word in text else 'no'}" for text in texts]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    both = ["--model", checkpoints["bert"], "--task", f"{tmp_path / 'cats.csv'},{tmp_path / 'birds.csv'}"]
    run("extract", *both, "--store", tmp_path / "store", "--for", "probe", "--stratify", "--format", "float32")
    how = [*both, "--store", tmp_path / "store", "--tuner", "probe", *TRAIN]
    own = ["--class-weights", "balanced", "--metric", "f1_macro"]
    done = run("train", *how, *own, "--out", tmp_path / "run")
    assert done["test"].keys() == {"cats.f1_macro", "birds.f1_macro", "average"}
    loaded = pipeline.load_run(tmp_path / "run")
    for job in loaded.job.each:
        labels = job.tables["train"].labels
        expected = [f"{name}={len(labels) / 2 / labels.count(i)!r}" for i, name in enumerate(("no", "yes"))]
        assert list(job.objective.config.class_weights) == expected
    assert loaded.job.jobs["cats"].objective.config != loaded.job.jobs["birds"].objective.config
    kept = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert kept["objective_options"]["class_weights"] == ["balanced"] and kept["stratify"] is True
    run("train", "--recipe", tmp_path / "run" / "recipe.yaml", "--out", tmp_path / "again")
    assert losses(tmp_path / "again") == losses(tmp_path / "run")
    run("train", *how, "--metric", "f1_macro", "--out", tmp_path / "plain")
    assert losses(tmp_path / "plain") != losses(tmp_path / "run")
    refused(invoke("evaluate", tmp_path / "run", "--report"), "several tasks", "cats, birds")
    found = run("evaluate", tmp_path / "run", "--task", "cats", "--report")
    assert found["f1_macro"] == pytest.approx(done["test"]["cats.f1_macro"]) and found["report"]


def test_what_several_tasks_do_not_take(tables: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    bert = checkpoints["bert"]
    both = options(tables, bert, tmp_path / "store")
    run("extract", *both, "--for", "probe,head2toe")
    train = ["train", *both, "--out", tmp_path / "run"]
    refused(invoke(*train, "--tuner", "head2toe"), "head2toe", "weights of a head")
    refused(invoke(*train, "--tuner", "probe", "--objective", "regression"), "animals", "class")
    refused(invoke(*train, "--tuner", "probe", "--model", f"a={bert},b={bert}"), "several tasks", "one backbone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Regression, "counts", "words")
        refused(invoke(*train, "--tuner", "probe", "--accumulate", 2), "--accumulate", "words of lengths")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Regression, "coupled", True)
        refused(invoke(*train, "--tuner", "probe", "--accumulate", 2), "--accumulate", "objective regression")
    same = f"{tables / 'animals.csv'},{tables / 'animals.csv'}"
    refused(invoke(*train, "--tuner", "probe", "--task", same), "two tasks", "animals")
    for command in ("plan", "bench", "compare"):
        refused(invoke(command, *both), f"{command} takes one task")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="one task"):
        pipeline.open_store(tmp_path / "store").stream(task=both[3], states="encoder.3")
    one = run("train", *options(tables, bert, tmp_path / "store")[:2], "--task", tables / "animals.csv", "--tuner",
              "probe", "--store", tmp_path / "store", *TRAIN, "--out", tmp_path / "one")  # fmt: skip
    refused(invoke("evaluate", one["run"], "--task", "animals"), "a run of one task")


def test_the_order_of_the_tasks_is_part_of_an_unfinished_run(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which task a step is of follows from it, also where both have the same texts."""
    files = [tmp_path / f"{name}.csv" for name in ("one", "two")]
    for k, file in enumerate(files, 1):
        file.write_text("text,label\n" + "".join(f"{text},{i / k}\n" for i, text in enumerate(tiny.sentences(30))))
    where = ["--model", checkpoints["bert"], "--store", tmp_path / "store"]
    one, other = (",".join(map(str, tasks)) for tasks in (files, files[::-1]))
    run("extract", *where, "--task", one, "--for", "probe")
    train = ["train", *where, "--tuner", "probe", "--epochs", 2, "--out", tmp_path / "run", "--task"]

    def killed(training: Training, *given: Any) -> None:
        real(training, *given)
        raise KeyboardInterrupt

    real = Training.close_epoch
    with monkeypatch.context() as patch:
        patch.setattr(Training, "close_epoch", killed)
        assert invoke(*train, one).exit_code
    refused(invoke(*train, other), "tasks 'one, two', now 'two, one'")
    assert run(*train, one)["epochs"] == 2


def test_what_comes_next_is_a_tuner_that_several_heads_can_share(tables, checkpoints, tmp_path):
    done = invoke("extract", *options(tables, checkpoints["bert"], tmp_path / "store"), "--for", "head2toe,probe")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("next: pipeline train")]
    assert "--tuner probe" in line and "head2toe" not in line
    trained = invoke(*shlex.split(line.removeprefix("next: pipeline ")), *TRAIN, "--out", tmp_path / "run")
    assert trained.exit_code == 0, trained.output
