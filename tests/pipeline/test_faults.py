"""Random faults over every kind of file there is, of stores and of runs: none changes an answer in silence.

Of a store each is found by `verify --deep`, but for files that nothing reads; and whatever it is, scoring a run gives
the same numbers or one line. Of a run, scoring, predicting and going on give the same or one line.
Three hundred: `FAULTS=300 pytest …`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from safetensors.torch import load_file

from pipeline.commands.train import run_train
from pipeline.recipe import Recipe
from pipeline.runs import load_run
from pipeline.store import Store
from pipeline.store.errors import UserError
from pipeline.store.segments.blocks import _segment
from pipeline.train.tuners.sherl import Sherl
from tests.pipeline.test_errors import run
from tests.pipeline.test_interrupt import after
from tests.store.test_faults import damage

# What the store's files are, by where they stand; every file is one of these.
KINDS = {
    "store": "store.json",
    "space": "spaces/*/space.json",
    "manifest": "spaces/*/segments/*/manifest.json",
    "group": "spaces/*/segments/*/zarr.json",
    "array": "spaces/*/segments/*/*/zarr.json",
    "chunk": "spaces/*/segments/*/*/c.*",
    "marker": "spaces/*/superseded/*",
    "table": "spaces/*/tasks/*/*.parquet",
    "record": "spaces/*/tasks/*/extracted-*.json",
    "weights manifest": "weights/*/manifest.json",
    "tail": "weights/*/tail.safetensors",
    "configuration": "weights/*/config.json",
    "source": "weights/*/source.json",
    "late layer": "weights/*/block-*.safetensors",
    "first weights": "weights/*/lst-*.safetensors",
    "projection": "weights/*/projection-*",
    "work": "spaces/*/work/*",
    "quarantine": "quarantine/*",
}
UNREAD = ("work", "quarantine")
RUN = {"recipe": "recipe.yaml", "tuner": "tuner.safetensors", "metrics": "metrics.json", "log": "log.jsonl"}
STOPPED = {"recipe": "recipe.yaml", "resume": "resume.safetensors", "log": "log.jsonl"}
TEXTS = [("a cat sees the dog", "the tree"), ("never", "a house"), ("old bird runs in the red tree", "on")]


@dataclass
class World:
    """A store with every kind of file, a finished run and one that was stopped, and what they answer."""

    folder: Path
    checkpoint: Path
    answers: Any = None
    resumed: Any = None

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def options(self, out: Path) -> Recipe:
        return Recipe(
            model=str(self.checkpoint), task="pairs", tuner="sherl", tuner_options={"insert": "multi:2"},
            projection="none",
            store=str(self.store), epochs=3, batch_size=8, limit=24, out=str(out), overwrite=False,
        )  # fmt: skip

    def ask(self) -> Any:
        """Scores and predictions of the finished run."""
        _segment.cache_clear()
        loaded = load_run(self.folder / "run")
        return loaded.evaluate("test"), loaded.evaluate("train"), loaded.predict(TEXTS)

    def go_on(self, stopped: Path) -> Any:
        """What the stopped run comes to."""
        _segment.cache_clear()
        result = run_train(self.options(stopped), lambda text: None, quiet=True)
        tensors = {k: v.tolist() for k, v in load_file(stopped / "tuner.safetensors").items()}
        return result["test"], result["validation"], result["best_epoch"], tensors


@pytest.fixture(scope="module")
def world(checkpoints, table, tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    made = World(folder, checkpoints["bert"])
    task = [
        "--model",
        checkpoints["bert"],
        "--task",
        table,
        "--text",
        "first",
        "--text-pair",
        "second",
        "--label",
        "label",
    ]
    extract = ["extract", *task, "--store", made.store]
    for more in (
        ["--limit", 12, "--for", "probe"],
        ["--limit", 24, "--for", "probe"],
        ["--limit", 24, "--for", "sherl", "--projection", "orthogonal:8", "--format", "int8"],
    ):
        assert run(*extract, *more).exit_code == 0
    assert run("store", "compact", "--store", made.store).exit_code == 0
    # From here on supplements of what was compacted.
    assert (
        run(*extract, "--limit", 24, "--for", "sherl,lst", "--insert", "multi:2", "--init", "magnitude").exit_code == 0
    )
    (made.store / "quarantine").mkdir()
    (made.store / "quarantine" / "spaces--old").write_bytes(bytes(100))
    work = next(made.store.glob("spaces/*")) / "work"
    work.mkdir()
    (work / "0123456789abcdef.safetensors").write_bytes(bytes(100))
    run_train(made.options(folder / "run"), lambda text: None, quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sherl, "forward", after(8, Sherl.forward))
        with pytest.raises((UserError, KeyboardInterrupt)):
            run_train(made.options(folder / "stopped"), lambda text: None, quiet=True)
    made.answers = made.ask()
    shutil.copytree(folder / "stopped", folder / "whole")
    made.resumed = made.go_on(folder / "whole")
    return made


def found_by_store(world: World) -> bool:
    """Whether `verify --deep` says that something is wrong, in one line each."""
    _segment.cache_clear()
    try:
        problems = [p.what for p in Store.open(world.store).verify(deep=True)]
    except UserError as error:
        problems = [str(error)]
    assert all("\n" not in what for what in problems)
    return bool(problems)


def same_or_refused(ask: Any, expected: Any) -> bool:
    """Whether `ask` refuses; an answer is the expected one."""
    try:
        answer = ask()
    except UserError as error:
        assert str(error)
        return True
    assert answer == expected, "another answer"
    return False


def is_replaceable(kind: str, victim: Path) -> bool:
    """Whether a store without the file is a sound store that says the same: a segment whose marker is gone is read
    again beside its successor, of two tables with the same rows one is enough, and a record of states that no table
    names only helps `verify`."""
    if kind == "record":
        return bool(json.loads(victim.read_bytes())["states"])
    if kind != "table":
        return kind == "marker"
    split, rows, _ = victim.name.rsplit("-", 2)

    others = [p for p in victim.parent.glob(f"{split}-{rows}-*") if p != victim]
    return any(parquet.read_table(p).equals(parquet.read_table(victim)) for p in others)


def test_the_world_has_every_kind_of_file(world: World) -> None:
    known = {name: set(world.store.glob(pattern)) for name, pattern in KINDS.items()}
    assert all(known.values()), [name for name, files in known.items() if not files]
    assert set().union(*known.values()) == {p for p in world.store.rglob("*") if p.is_file()}
    for folder, kinds in (("run", RUN), ("stopped", STOPPED)):
        there = {p.name for p in (world.folder / folder).rglob("*") if p.is_file()}
        assert there >= set(kinds.values())
    assert not found_by_store(world)


def test_no_fault_is_silent(world: World) -> None:
    pick, count = random.Random(0), int(os.environ.get("FAULTS", "48"))
    silent: list[str] = []
    for number in range(count):
        # Half of them in the store, each kind of file as often as another; a quarter each in the two runs.
        where = pick.choice(["store", "store", "run", "stopped"])
        if where == "store":
            kind = pick.choice(list(KINDS))
            victim = pick.choice(sorted(world.store.glob(KINDS[kind])))
        else:
            kind = where
            victim = pick.choice(sorted(p for p in (world.folder / where).rglob("*") if p.is_file()))
        data, spare = victim.read_bytes(), kind in UNREAD or is_replaceable(kind, victim)
        what = f"{number}: {damage(victim, pick)} {victim.relative_to(world.folder)}"
        try:
            if where == "store":
                found = found_by_store(world)
                refused = same_or_refused(world.ask, world.answers)
                if not (found or refused or (spare and (kind in UNREAD or not victim.exists()))):
                    silent.append(what)
            elif where == "run":
                same_or_refused(world.ask, world.answers)
            else:
                going = world.folder / f"going-{number}"
                shutil.copytree(world.folder / "stopped", going)
                same_or_refused(lambda at=going: world.go_on(at), world.resumed)  # type: ignore[misc]
                shutil.rmtree(going)
        except Exception as error:  # an answer that differs, or a traceback
            silent.append(f"{what}: {type(error).__name__} {str(error).splitlines()[0][:100]}")
        victim.write_bytes(data)
    assert not silent, "\n".join(silent)
    assert not found_by_store(world) and world.ask() == world.answers
