"""SIGKILL at any step of every command that writes to a store: `python -m tests.pipeline.kills --kills 100`.

Each command runs in a forked child that counts its steps, the changes it makes to the file system (Python's audit
events, and the middle of every file that is written), and kills itself before a chosen one. How busy the machine is
makes no difference. `tests.extract.kills` kills an extraction at moments of the clock instead.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cli.main import main as command_line
from pipeline.store import Store
from pipeline.store.files.local import Files
from pipeline.store.segments.blocks import _segment
from pipeline.store.segments.index import bundles
from pipeline.store.segments.unsealed import sign
from pipeline.store.upkeep.rewrite import read_bundle
from tests import tiny

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
Content = dict[tuple[str, str, str], bytes]


@dataclass
class Scene:
    """A command, the store it starts on ("" is none), and what must hold between a kill and the next attempt."""

    name: str
    start: str
    arguments: list[str]
    damaged: bool = False  # the store it starts on is
    gone: str = ""  # id of the space that it removes
    expected: Content = field(default_factory=dict)  # what the store holds at the end
    kept: Content = field(default_factory=dict)  # what it holds at every moment
    steps: int = 0


class Torn(Sequence[Any]):
    """Buffers of a file; `step` is called when half of them has been written."""

    def __init__(self, buffers: Sequence[Any], step: Callable[[], None]) -> None:
        self.buffers, self.step, self.told = buffers, step, False

    def __len__(self) -> int:
        return len(self.buffers)

    def __getitem__(self, index: Any) -> Any:
        return self.buffers[index]

    def __iter__(self) -> Iterator[Any]:
        for number, buffer in enumerate(self.buffers):
            if self.told or number < len(self.buffers) - 1:
                yield buffer
                continue
            view = memoryview(buffer).cast("B")
            yield view[: len(view) // 2]
            self.told = True
            self.step()
            yield view[len(view) // 2 :]


def forked(arguments: Sequence[str], store: Path, kill_at: int = 0) -> tuple[int, int, str]:
    """Run `pipeline ARGUMENTS` in a child that is killed before its step `kill_at` in `store` (0: never). Returns its
    exit status, the steps it took, and what it said."""
    said = store.parent / "said.txt"
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        code = 70
        try:
            for stream in (1, 2):
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
            code = _run(arguments, store, kill_at, writer)
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        steps = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, int(steps or 0), said.read_text(encoding="utf-8", errors="replace")


def _run(arguments: Sequence[str], store: Path, kill_at: int, report: int) -> int:
    steps, root, code = 0, str(store), 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, values: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = values
            changes = isinstance(flags, int) and flags & WRITES and str(path).startswith(root)
        else:
            # Below a folder that is being removed, names are relative to a descriptor.
            changes = event in CHANGES and (str(values[0]).startswith(root) or values[-1] not in (None, -1))
        if changes:
            step()

    write = Files.write
    Files.write = lambda self, name, buffers: write(self, name, Torn(buffers, step))  # type: ignore[method-assign]
    sys.addaudithook(watch)
    try:
        command_line([*arguments, "--store", str(store), "--json"], standalone_mode=False)
    except SystemExit as end:
        code = int(end.code or 0)
    os.write(report, str(steps).encode())
    return code


def content(store: Path) -> Content:
    """(space, sample, state) → its bytes as readers find them. All copies of a sample must be equal."""
    _segment.cache_clear()
    out: Content = {}
    if not (store / "store.json").exists():
        return out
    for space in Store.open(store).spaces():
        for bundle in bundles(space.segments()):
            read = read_bundle(bundle, list(bundle.holder), np.arange(len(bundle.base)))
            for name, state in read.states.items():
                offsets = read.offsets(name.split(".", 1)[0])
                for i, key in enumerate(read.keys):
                    value = state.values[offsets[i] : offsets[i + 1]].tobytes()
                    assert out.setdefault((space.id, key, name), value) == value, f"{name} of {key} differs"
    return out


class Stage:
    """Stores in `folder` on which each command has something to do, and what each is to make of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stores = folder / "stores"
        self.stores.mkdir()
        self.model = tiny.bert(folder / "bert")
        self.scenes = {scene.name: scene for scene in self._scenes()}
        for scene in self.scenes.values():
            place = self._place(scene)
            code, scene.steps, said = forked(scene.arguments, place)
            assert code == 0 and scene.steps, f"{scene.name}: {said}"
            scene.expected = content(place)
            assert Store.open(place).verify(deep=True) == []
            # A repair finds what is damaged; everything else must be readable at every moment.
            before = {} if scene.damaged or not scene.start else content(self.stores / scene.start)
            scene.kept = {key: v for key, v in before.items() if key[0] != scene.gone}

    def _extract(self, table: str, tuners: str, *more: str) -> list[str]:
        path = self.folder / f"{table}.tsv"
        if not path.exists():
            tiny.write_table(path, 30 if table == "first" else 40)
        columns = ["--text", "first", "--text-pair", "second", "--label", "label"]
        size = ["--format", "float32", "--batch-size", "1"]  # alone in a batch, a sample has the same states every time
        return ["extract", "--model", str(self.model), "--task", str(path), "--for", tuners, *columns, *size, *more]

    def _scenes(self) -> list[Scene]:
        self.make("probed", self._extract("first", "probe"))
        self.make("laddered", self._extract("first", "lst"), "probed")
        self.make("other", self._extract("second", "lst"))
        self.make("doubled", ["store", "merge", str(self.stores / "other")], "laddered")
        self.make("compacted", ["store", "compact"], "doubled")
        self.make("two", self._extract("first", "probe", "--max-length", "16"), "doubled")
        self._garbage(Store.open(self.stores / "compacted"))
        self.make("again", self._extract("first", "lst"))
        self.make("rotten", ["store", "merge", str(self.stores / "again")], "laddered")
        self._damage(Store.open(self.stores / "rotten"))
        (kept,) = Store.open(self.stores / "doubled").spaces()
        (gone,) = (s.id for s in Store.open(self.stores / "two").spaces() if s.id != kept.id)
        return [
            Scene("extract", "", self._extract("first", "lst")),
            Scene("supplement", "probed", self._extract("first", "lst")),
            Scene("compact", "doubled", ["store", "compact"]),
            Scene("gc", "compacted", ["store", "gc", "--older-than", "0s", "--delete"]),
            Scene("merge", "laddered", ["store", "merge", str(self.stores / "other")]),
            Scene("pull", "", ["store", "pull", str(self.stores / "doubled")]),
            Scene("repair", "rotten", ["store", "repair"], damaged=True),
            Scene("rm", "two", ["store", "rm", gone[:12], "--yes"], gone=gone),
        ]

    def make(self, name: str, arguments: Sequence[str], start: str = "") -> None:
        """The store `name`, made from a copy of `start` by a command, in this process."""
        if start:
            shutil.copytree(self.stores / start, self.stores / name)
        place = str(self.stores / name)
        command_line([*arguments, "--store", place, "--json"], standalone_mode=False)

    def _garbage(self, store: Store) -> None:
        """Something of each kind that `gc` removes."""
        store.save_weights("cd" * 16, {"tail.safetensors": {"w": torch.ones(3)}})
        (space,) = store.spaces()
        segments = f"spaces/{space.id}/segments"
        old = space.superseded()[0]
        shutil.copytree(store.path / segments / old, store.path / segments / f".incoming-{old}-01234567")
        shutil.copytree(store.path / segments / old, store.path / "quarantine" / "old")
        sign(store.files, f"{segments}/.incoming-{old}-01234567/writer.json")

    def _damage(self, store: Store) -> None:
        """Damage that costs no sample, since each stands twice; what `repair` cannot save is told by other tests."""
        (space,) = store.spaces()
        chunk = sorted(store.path.glob("spaces/*/segments/*/encoder.1/c.*"))[0]
        data = chunk.read_bytes()
        chunk.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        marker = store.path / f"spaces/{space.id}/superseded/{space.segments()[-1].id}"
        marker.parent.mkdir()
        marker.write_text("{}")

    def _place(self, scene: Scene) -> Path:
        place = self.folder / "killed" / "store"
        shutil.rmtree(place.parent, ignore_errors=True)
        place.parent.mkdir()
        if scene.start:
            shutil.copytree(self.stores / scene.start, place)
        return place

    def run(self, kills: int, seed: int = 0) -> Counter[str]:
        """Kill each command in turn at random steps, `kills` times in all, some of them again before they may end;
        returns how often each was. Raises AssertionError for anything that does not hold."""
        pick, done, turns = random.Random(seed), Counter[str](), cycle(self.scenes.values())
        while done.total() < kills:
            scene = next(turns)
            at = [pick.randrange(1, scene.steps + 1)]
            while done.total() + len(at) < kills and pick.random() < 0.3:
                at.append(pick.randrange(1, scene.steps + 1))
            done[scene.name] += self.attempt(scene, at)
        return done

    def attempt(self, scene: Scene, steps: Sequence[int]) -> int:
        """Kill a command before each of `steps`, each time beginning again on what was left, then let it end; returns
        how often it was killed: what is left to do may take fewer steps."""
        place, killed = self._place(scene), 0
        what = f"{scene.name}, killed before step {' and '.join(map(str, steps))} of {scene.steps}"
        for at in (*steps, 0):
            code, _, said = forked(scene.arguments, place, at)
            if code != -signal.SIGKILL:
                break
            killed += 1
            self._between(scene, place, what)
        over = scene.gone and "there is no feature space" in said  # it was killed at the very last step
        assert code == 0 or over, f"{what}: the rerun ended with {code}: {said}"
        damage = Store.open(place).verify(deep=True)
        assert damage == [], f"{what}: {damage[:3]}"
        assert content(place) == scene.expected, f"{what}: the store holds other states than after a whole run"
        return killed

    def _between(self, scene: Scene, place: Path, what: str) -> None:
        """After a kill: no damage, and nothing lost."""
        if scene.damaged or not (place / "store.json").exists():
            return
        # Tables come one after the other; one that names another which is not there yet is told by `verify`.
        found = [p for p in Store.open(place).verify(deep=True) if "/tasks/" not in p.file]
        assert not found, f"{what}: {found[:3]}"
        there = content(place)
        assert scene.kept.items() <= there.items(), f"{what}: a state was lost"
        if scene.gone:
            whole = {k for k in content(self.stores / scene.start) if k[0] == scene.gone}
            left = {k for k in there if k[0] == scene.gone}
            assert left in (set(), whole), f"{what}: half a feature space is seen"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", metavar="NAMES", help="kill these commands once before each of their steps instead")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder))
        if options.every:
            scenes = [stage.scenes[name] for name in options.every.split(",")]
            done = Counter({s.name: sum(stage.attempt(s, [at]) for at in range(1, s.steps + 1)) for s in scenes})
        else:
            done = stage.run(options.kills, options.seed)
    steps = ", ".join(f"{name} {count} (of {stage.scenes[name].steps} steps)" for name, count in done.items())
    sys.stdout.write(f"{done.total()} kills: {steps}\nevery rerun succeeded, no store was damaged, no state lost\n")


if __name__ == "__main__":
    main()
