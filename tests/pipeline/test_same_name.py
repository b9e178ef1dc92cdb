"""Two tables of one file name are two tasks: neither is taken for the other, and runs of them do not meet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pipeline
from pipeline import api
from pipeline.jobs.job import load_job
from pipeline.recipe import Recipe
from pipeline.store import Store, StoreError
from tests.pipeline.test_errors import refused, run
from tests.pipeline.test_versions import extract, labels, write

SICK = [("the cat sleeps", "neutral"), ("a bird sees the house", "entailment"), ("old tree", "contradiction")]


def write_sick(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    rows = [f"{text} {i}\t{label}" for i in range(12) for text, label in SICK]
    path.write_text("\n".join(["sentence\tlabel", *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def both(checkpoints, tmp_path_factory) -> tuple[dict[str, str], Path, Path]:
    """A store with `sick/train.tsv` and, later, `sst2/train.tsv`."""
    folder = tmp_path_factory.mktemp("both")
    options = {"model": str(checkpoints["bert"]), "store": str(folder / "store"), "tuner": "probe"}
    sick = write_sick(folder / "sick" / "train.tsv")
    sst2 = folder / "sst2" / "train.tsv"
    sst2.parent.mkdir()
    sst2.write_text(write(folder / "rows.csv", 40).read_text(encoding="utf-8").replace(",", "\t"), encoding="utf-8")
    extract(options, sick)
    extract(options, sst2)
    return options, sick, sst2


def ids(options: dict[str, str]) -> list[str]:
    """The tasks of the only feature space, as `status` calls them."""
    result = run("store", "status", "--store", options["store"], "--json")
    return list(json.loads(result.stdout)["spaces"][0]["tasks"])


def test_an_ambiguous_name_is_asked_about(both):
    options, sick, sst2 = both
    first, second = ids(options)
    said = refused(
        run("train", "--task", "train", "--model", options["model"], "--store", options["store"], "--tuner", "probe"),
        "--task", first, second, "contradiction",
    )  # fmt: skip
    assert said.count("extracted ") == 2
    with pytest.raises(StoreError, match="train@"):
        api.stream(task="train", store=options["store"], states=["encoder.0"])
    classes = {str(p): len(load_job(Recipe(task=str(p), **options)).spec.labels) for p in (sick, sst2)}
    assert classes == {str(sick): 3, str(sst2): 2}
    by_id = {len(load_job(Recipe(task=name, **options)).spec.labels): name for name in (first, second)}
    assert by_id.keys() == {2, 3}
    short = by_id[3][: len("train@") + 8]
    assert labels(options, short) == labels(options, sick)
    with pytest.raises(StoreError, match="now 'stars'"):
        labels(options, short, label="stars")
    with pytest.raises(StoreError, match="train@ffffffff"):
        labels(options, "train@ffffffff")


def test_status_shows_both(both):
    options, _, _ = both
    named = ids(options)
    assert len(named) == 2 and all(name.startswith("train@") for name in named)
    text = run("store", "status", "--store", options["store"]).stdout
    assert all(f"  {name}" in text for name in named) and "contradiction" in text


def test_default_run_folders_do_not_meet(both, tmp_path, monkeypatch):
    options, sick, sst2 = both
    monkeypatch.chdir(tmp_path)
    given = {**options, "epochs": 1, "batch_size": 16}
    runs = [api.train(task=str(path), **given)["run"] for path in (sick, sst2)]
    assert runs[0] != runs[1] and len(list((tmp_path / "runs").iterdir())) == 2
    for folder, path, classes in zip(runs, (sick, sst2), (3, 2), strict=True):
        assert len(pipeline.load_run(folder).spec.labels) == classes
        with pytest.raises(pipeline.UserError, match="holds a finished run"):
            api.train(task=str(path), **given)


def test_a_run_by_id_is_trained_again_on_the_same_rows(both, tmp_path):
    options, _, _ = both
    name = next(n for n in ids(options) if len(load_job(Recipe(task=n, **options)).spec.labels) == 3)
    done = api.train(task=name, epochs=1, batch_size=16, out=str(tmp_path / "run"), **options)
    assert done["task"] == "train"
    again = run("train", "--recipe", tmp_path / "run" / "recipe.yaml", "--out", tmp_path / "again", "--json")
    assert json.loads(again.stdout)["test"] == done["test"]
    refused(run("extract", "--task", name, "--model", options["model"], "--store", options["store"]), name, "file")


def test_other_columns_are_another_task(checkpoints, tmp_path):
    options = {"model": str(checkpoints["bert"]), "store": str(tmp_path / "store"), "tuner": "probe"}
    task = write(tmp_path / "my.csv", 30)
    extract(options, task, label="stars")
    extract(options, task)
    for name in ("my", task):
        with pytest.raises(StoreError, match=r"--label.*stars"):
            labels(options, name)
    assert set(labels(options, "my", label="stars")["train"].values()) == {0, 1, 2}


def test_the_same_rows_under_one_name_are_one_task(checkpoints, tmp_path):
    """A copy of the file is no other task; extracting it again adds no table."""
    options = {"model": str(checkpoints["bert"]), "store": str(tmp_path / "store"), "tuner": "probe"}
    found = set()
    for name in ("a", "b"):
        task = str(write(tmp_path / name / "my.csv", 30))
        found.add(api.extract(task, model=options["model"], store=options["store"], tuners=["probe"])["task id"])
    assert found == {f"my@{load_job(Recipe(task='my', **options)).version[:12]}"}
    (space,) = Store.open(options["store"]).spaces()
    assert len(space.tables()) == 3 and sum(map(len, labels(options, "my").values())) == 30
