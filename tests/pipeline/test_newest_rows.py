"""Of an edited file the rows extracted last count, as their headers say: copying a store changes every file's time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.jobs.job import load_job
from pipeline.recipe import Recipe
from pipeline.store import Store, StoreError, TaskTable
from pipeline.store.upkeep.transfer import transfer
from tests.pipeline.test_versions import extract, labels, write
from tests.store.helpers import key, sealed, space


def flipped(options: dict[str, str], name: str | Path = "my") -> bool:
    """Whether a run would read the labels of the second edition."""
    found = {label == int("bad" in text) for rows in labels(options, name).values() for text, label in rows.items()}
    (value,) = found
    return value


@pytest.fixture
def stores(checkpoints, tmp_path) -> list[dict[str, str]]:
    """Options of a store made of my.csv, and of one made after an edit."""
    made = [{"model": str(checkpoints["bert"]), "store": str(tmp_path / n), "tuner": "probe"} for n in ("old", "new")]
    for edition, options in enumerate(made):
        extract(options, write(tmp_path / "my.csv", 30, flipped=bool(edition)))
    return made


def test_merging_an_older_store_brings_no_old_labels_back(stores):
    old, new = stores
    assert not flipped(old) and flipped(new)
    assert not transfer(Store.open(old["store"]), Store.open(new["store"])).problems
    for table in Path(new["store"]).glob("spaces/*/tasks/*/*"):
        os.utime(table, (1, 1))  # as rsync -a or a clock that is off may have it
    assert flipped(new)
    assert not transfer(Store.open(new["store"]), Store.open(old["store"])).problems
    assert flipped(old)


def test_rows_of_two_places_are_not_ordered_by_time(stores, tmp_path):
    """Another file of the name, extracted elsewhere: which is right only the user knows."""
    _, new = stores
    other = {**new, "store": str(tmp_path / "other")}
    extract(other, write(tmp_path / "elsewhere" / "my.csv", 30))
    transfer(Store.open(other["store"]), Store.open(new["store"]))
    with pytest.raises(StoreError, match="my@"):
        labels(new, "my")
    assert flipped(new, tmp_path / "my.csv") and not flipped(new, tmp_path / "elsewhere" / "my.csv")


def test_tables_that_do_not_say_when_are_asked_about(tmp_path):
    home = space(tmp_path)
    sealed(home, [1, 2])
    early = {"task": "t", "split": "train", "created": "2026-01-31T10:00:00.000+00:00"}
    late = {**early, "created": "2026-02-01T09:00:00.000+00:00"}
    first, second = (home.save_table(TaskTable(h, [key(1)], [i])) for i, h in enumerate((late, early)))
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    assert home.load_table("t", "train").labels == [0]
    home.save_table(TaskTable({"task": "t", "split": "train"}, [key(2)], [2]))
    with pytest.raises(StoreError, match="say which by its path"):
        home.load_table("t", "train")


def test_extracting_an_old_edition_again_makes_it_the_newest(stores, tmp_path):
    _, new = stores
    extract(new, write(tmp_path / "my.csv", 30))
    assert not flipped(new) and load_job(Recipe(task=str(tmp_path / "my.csv"), **new)).version
