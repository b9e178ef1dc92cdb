"""A task's tables change: a file is edited, another file has the same name, another column is the label. A run reads
tables of one version, the one asked for, and a finished run those it was trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

import pipeline
from pipeline import api
from pipeline.jobs.job import load_job
from pipeline.recipe import Recipe
from pipeline.store import Store, StoreError
from tests.pipeline.test_errors import refused, run


def write(path: Path, rows: int, flipped: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{'good' if i % 2 else 'bad'} film {i},{(i + flipped) % 2},{i % 3}" for i in range(rows)]
    path.write_text("\n".join(["sentence,label,stars", *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def options(checkpoints, tmp_path) -> dict[str, str]:
    return {"model": str(checkpoints["bert"]), "store": str(tmp_path / "store"), "tuner": "probe"}


def extract(options: dict[str, str], task: Path, **more: object) -> None:
    known = {k: v for k, v in options.items() if k != "tuner"}
    api.extract(str(task), tuners=["probe"], **known, **more)


def labels(options: dict[str, str], task: str | Path, **more: object) -> dict[str, dict[str, object]]:
    """What a run of `task` would read: split → text → label."""
    tables = load_job(Recipe(task=str(task), **options, **more)).tables
    return {s: {t[0]: label for t, label in zip(x.texts, x.labels, strict=True)} for s, x in tables.items()}


def test_an_edited_table_is_never_mixed_with_what_it_was(options, tmp_path):
    extract(options, write(tmp_path / "my.csv", 60))
    extract(options, write(tmp_path / "my.csv", 41, flipped=True))
    found = labels(options, "my")
    assert {s: len(rows) for s, rows in found.items()} == {"test": 4, "train": 33, "validation": 4}
    assert all(label == int("bad" in text) for rows in found.values() for text, label in rows.items())
    assert len(set().union(*found.values())) == 41
    extract(options, tmp_path / "my.csv", limit=5)  # fewer rows of the same version stand beside the others
    assert labels(options, "my") == found
    extract(options, write(tmp_path / "my.csv", 60))  # and back again
    assert {s: len(rows) for s, rows in labels(options, "my").items()} == {"test": 6, "train": 48, "validation": 6}


def test_a_file_that_is_not_the_stored_one_is_noticed(options, tmp_path):
    extract(options, write(tmp_path / "a" / "my.csv", 60))
    write(tmp_path / "b" / "my.csv", 60, flipped=True)
    words = ["--model", options["model"], "--store", options["store"], "--tuner", "probe", "--out", tmp_path / "run"]
    line = refused(
        run("train", "--task", tmp_path / "b" / "my.csv", *words), "my.csv", "pipeline extract", "--for probe"
    )
    assert str(tmp_path / "b" / "my.csv") in line and not (tmp_path / "run").exists()
    extract(options, tmp_path / "b" / "my.csv")
    first, second = (labels(options, tmp_path / name / "my.csv") for name in "ab")  # both are there, each to its own
    assert first["train"].keys() == second["train"].keys()
    assert all(first["train"][text] != label for text, label in second["train"].items())


def test_the_label_column_asked_for_is_the_one_read(options, tmp_path):
    task = write(tmp_path / "my.csv", 60)
    extract(options, task, label="stars")
    extract(options, task)
    assert set(labels(options, task, label="stars")["train"].values()) == {0, 1, 2}
    assert set(labels(options, task, label="label")["train"].values()) == {0, 1}
    for name in ("label", "text"):
        with pytest.raises(StoreError, match="nothing"):
            labels(options, task, **{name: "nothing"})


def test_a_run_keeps_to_the_tables_it_was_trained_on(options, tmp_path):
    extract(options, write(tmp_path / "my.csv", 60))
    out = tmp_path / "run"
    api.train(task=str(tmp_path / "my.csv"), out=str(out), epochs=2, batch_size=16, **options)
    before = pipeline.load_run(out).evaluate("test")
    extract(options, write(tmp_path / "my.csv", 60, flipped=True))
    again = pipeline.load_run(out)
    assert again.evaluate("test") == before
    for table in (space := again.job.found.space).tables():
        if (
            space.load_table(table.task, table.split, path=table.path).header["provenance"]
            == (again.job.tables["test"].header["provenance"])
        ):
            (Path(options["store"]) / table.path).unlink()
    refused(run("evaluate", out), str(out), "extract")


def test_a_run_does_not_go_on_with_other_labels(options, tmp_path, monkeypatch):
    from pipeline.train.fit.loop import Training

    extract(options, write(tmp_path / "my.csv", 60))
    given = {**options, "task": str(tmp_path / "my.csv"), "out": str(tmp_path / "run"), "epochs": 3, "batch_size": 16}
    with monkeypatch.context() as patched:
        patched.setattr(Training, "step", lambda self, group: (self.save(), (_ for _ in ()).throw(KeyboardInterrupt)))
        with pytest.raises(KeyboardInterrupt):
            api.train(**given)
    extract(options, write(tmp_path / "my.csv", 60, flipped=True))
    with pytest.raises(pipeline.UserError, match="unfinished run"):
        api.train(**given)


def test_extracting_what_is_there_adds_no_table(options, tmp_path):
    task = write(tmp_path / "my.csv", 60)
    extract(options, task)
    (space,) = Store.open(options["store"]).spaces()
    before = {t.path for t in space.tables()}
    extract(options, task)
    assert {t.path for t in space.tables()} == before
