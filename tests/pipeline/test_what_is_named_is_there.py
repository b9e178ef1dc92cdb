"""What a file of a store names is missed when it is gone: tables at train time, and all of it by `verify --deep`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import api
from pipeline.jobs.job import load_job
from pipeline.recipe import Recipe
from pipeline.store import Store, StoreError
from pipeline.store.upkeep.rewrite import compact
from pipeline.store.upkeep.transfer import transfer
from pipeline.store.upkeep.usage import collect, garbage
from tests.pipeline.test_errors import refused, run
from tests.pipeline.test_versions import extract, labels, write


@pytest.fixture(scope="module")
def made(checkpoints, tmp_path_factory) -> tuple[dict[str, str], Path]:
    """Two editions of my.csv in one store, the states of a second tuner in a supplement."""
    folder = tmp_path_factory.mktemp("made")
    options = {"model": str(checkpoints["bert"]), "store": str(folder / "store"), "tuner": "probe"}
    for edition in (False, True):
        extract(options, write(folder / "my.csv", 30, flipped=edition))
    extract_again(options, folder / "my.csv", "sherl")
    assert Store.open(options["store"]).verify(deep=True) == []
    return options, folder / "my.csv"


@pytest.fixture
def copied(made, tmp_path) -> dict[str, str]:
    options, _ = made
    shutil.copytree(options["store"], tmp_path / "store")
    return {**options, "store": str(tmp_path / "store")}


def newest(store: Path, split: str = "*") -> list[Path]:
    """The tables of the edition extracted last."""
    (home,) = Store.open(store).spaces()
    headers = {t.path: home.read_table(t).header for t in home.tables()}
    last = max(h["created"] for h in headers.values())
    version = next(h["provenance"] for h in headers.values() if h["created"] == last)
    found = [store / path for path, h in headers.items() if h["provenance"] == version]
    return [p for p in found if split in ("*", p.name.split("-")[0])]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_training_misses_a_table(copied, made, split, tmp_path):
    for path in newest(Path(copied["store"]), split):
        path.unlink()
    words = ["--model", copied["model"], "--store", copied["store"], "--tuner", "probe", "--epochs", 1]
    for task in ("my", made[1]):
        refused(run("train", "--task", task, *words, "--out", tmp_path / "run"), split, "pipeline extract")
    assert not (tmp_path / "run").exists()
    extract(copied, made[1])
    assert set(load_job(Recipe(task="my", **copied)).tables) == {"train", "validation", "test"}
    assert Store.open(copied["store"]).verify(deep=True) == []


def test_a_kill_after_the_first_table(checkpoints, tmp_path, monkeypatch):
    from pipeline.store.space import Space

    options = {"model": str(checkpoints["bert"]), "store": str(tmp_path / "store"), "tuner": "probe"}
    task, save, saved = write(tmp_path / "my.csv", 30), Space.save_table, []

    def once(self, table):
        if saved:
            raise KeyboardInterrupt
        saved.append(table)
        return save(self, table)

    with monkeypatch.context() as patched:
        patched.setattr(Space, "save_table", once)
        with pytest.raises(KeyboardInterrupt):
            extract(options, task)
    with pytest.raises(StoreError, match="test rows and 3 validation rows"):
        labels(options, task)
    assert Store.open(options["store"]).verify(deep=True)
    extract(options, task)
    assert len(labels(options, task)) == 3 and Store.open(options["store"]).verify(deep=True) == []


def test_without_its_newest_tables_a_name_does_not_fall_back(copied, made):
    for path in newest(Path(copied["store"])):
        path.unlink()
    with pytest.raises(StoreError, match=r"my@.*are gone"):
        labels(copied, "my")
    with pytest.raises(StoreError, match="changed"):
        labels(copied, made[1])


def record(store: Path) -> Path:
    """The record that the newest tables name."""
    (home,) = Store.open(store).spaces()
    name = max((home.read_table(t).header for t in home.tables()), key=lambda h: h["created"])["extracted"]
    return next(store.glob(f"spaces/*/tasks/*/extracted-{name}.json"))


def rid(pattern: str, pick: Callable[[list[Path]], list[Path]] = lambda found: found) -> Callable[[Path], None]:
    def remove(store: Path) -> None:
        found = pick(sorted(store.glob(pattern)))
        assert found
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


DELETIONS = {
    "newest tables": lambda store: [p.unlink() for p in newest(store)],
    "one of the newest tables": lambda store: newest(store, "test")[0].unlink(),
    "a record of an extraction": lambda store: record(store).unlink(),
    "a base": rid("spaces/*/segments/*", lambda f: f[:1]),
    "a supplement": rid("spaces/*/segments/*", lambda f: f[-1:]),
    "all weights": rid("weights"),
    "weights of the checkpoint": rid("weights/*"),
}


@pytest.mark.parametrize("what", DELETIONS)
def test_verify_misses(copied, made, what):
    store = Path(copied["store"])
    DELETIONS[what](store)
    found = Store.open(store).verify(deep=True)
    assert found and all("\n" not in p.what for p in found)
    assert run("store", "verify", "--deep", "--store", store).exit_code == 1
    assert run("store", "repair", "--store", store).exit_code == 0
    for tuner in ("probe", "sherl"):
        extract_again(copied, made[1], tuner)
    assert Store.open(store).verify(deep=True) == []


def extract_again(options: dict[str, str], task: Path, tuner: str) -> None:
    api.extract(str(task), model=options["model"], store=options["store"], tuners=[tuner])


def test_verify_misses_a_successor(copied):
    opened = Store.open(copied["store"])
    (home,) = opened.spaces()
    before = {s.id for s in home.segments()}
    assert compact(home)["new"]
    assert Store.open(copied["store"]).verify(deep=True) == []
    for segment in home.segments():
        if segment.id not in before:
            shutil.rmtree(segment.path)
    found = Store.open(copied["store"]).verify(deep=True)
    assert any("written anew" in p.what for p in found)


def test_sound_stores_stay_sound(copied, tmp_path):
    """Compacted, collected, copied: nothing is missed that nobody needs."""
    opened = Store.open(copied["store"])
    compact(opened.spaces()[0])
    collect(opened, garbage(opened, older_than=0))
    target = Store.create(tmp_path / "copy")
    assert not transfer(Store.open(copied["store"]), target).problems
    for place in (copied["store"], tmp_path / "copy"):
        assert Store.open(place).verify(deep=True) == []
    assert labels({**copied, "store": str(tmp_path / "copy")}, "my")
