"""A state machine over two stores: whatever happens to them, in whatever order, a plain dictionary says what they hold.

Samples depend only on their number, so the model needs no more than which states of which sample are sealed where.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.store import Samples, SegmentWriter, Space, Store, StoreError, read_block, stream_of
from pipeline.store.segments.alive import describe_writer
from pipeline.store.segments.blocks import _segment
from pipeline.store.segments.index import bundles
from pipeline.store.upkeep.repair import repair
from pipeline.store.upkeep.rewrite import compact
from pipeline.store.upkeep.transfer import transfer
from pipeline.store.upkeep.usage import collect, garbage
from tests.store.helpers import IDENTITY, assert_equal, key, samples

STATES = ("encoder.1", "encoder.3", "decoder.1")
NUMBERS = range(12)
NUMBER = {key(n): n for n in NUMBERS}
PLACES = ("mine", "theirs")
SEGMENT = "spaces/*/segments/2*"
VICTIMS = ("store.json", "spaces/*/superseded/*", *(f"{SEGMENT}/{n}" for n in ("*/c.*", "*.json", "*/*.json")))
Model = dict[int, set[str]]

places = st.sampled_from(PLACES)
numbers = st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=6, unique=True)
some_states = st.sets(st.sampled_from(STATES), min_size=1).map(sorted)
# Of what is written: sealed at once, sealed later, or its writer killed after so many steps.
fates = st.one_of(st.just("seal"), st.just("later"), st.integers(0, 40))


class Killed(BaseException):
    """As SIGKILL: no code of ours catches it."""


@dataclass
class Pending:
    """Samples that a writer holds and has not sealed."""

    place: str
    writer: SegmentWriter
    chosen: list[int]
    states: list[str]


def some(chosen: list[int], states: list[str]) -> Samples:
    """Samples with `states` alone, equal to those with all of them."""
    whole = samples(chosen, STATES)
    streams = {stream_of(s) for s in states}
    return Samples(
        whole.keys,
        {s: v for s, v in whole.lengths.items() if s in streams},
        {s: whole.states[s] for s in states},
        {c: v for c, v in whole.columns.items() if stream_of(c) in streams},
    )


def dead() -> dict[str, Any]:
    """A writer of this machine that runs no more."""
    return {**describe_writer(), "started": -1}


class Machine(RuleBasedStateMachine):
    @initialize(mine=numbers, theirs=numbers)
    def begin(self, mine: list[int], theirs: list[int]) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("pipeline.store.format.arrays.CHUNK_BYTES", 64)
        self.patch.setattr("os.fsync", lambda descriptor: None)  # Processes are killed here, no machine is.
        self.model: dict[str, Model] = {place: {} for place in PLACES}
        self.pending: list[Pending] = []
        for place, chosen in zip(PLACES, (mine, theirs), strict=True):
            Store.create(self.folder / place).create_space(IDENTITY)
            self.write(place, chosen, ["encoder.3"], "seal")

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.patch.undo()
            shutil.rmtree(self.folder)

    def store(self, place: str) -> Store:
        """Opened anew, as by another process."""
        _segment.cache_clear()
        return Store.open(self.folder / place)

    def space(self, place: str) -> Space:
        (space,) = self.store(place).spaces()
        return space

    def sealed(self, place: str, chosen: list[int], states: list[str]) -> None:
        for number in chosen:
            self.model[place].setdefault(number, set()).update(states)

    @rule(place=places, chosen=numbers, states=some_states, fate=fates)
    def write(self, place: str, chosen: list[int], states: list[str], fate: int | str) -> None:
        """Samples that may be there already: a race of two writers."""
        writer = self.space(place).writer({"note": "machine"})
        writer.add(some(chosen, states))
        self.end(Pending(place, writer, chosen, states), fate)

    @rule(place=places, which=st.integers(0, 99), states=some_states, fate=fates)
    def supplement(self, place: str, which: int, states: list[str], fate: int | str) -> None:
        space = self.space(place)
        found = bundles(space.segments())
        bundle = found[which % len(found)] if found else None
        more = [s for s in states if bundle and s not in bundle.holder]
        if bundle is None or not more:
            return
        chosen = [NUMBER[k] for k in bundle.base.keys]
        addition = some(chosen, more)
        addition.columns = {c: v for c, v in addition.columns.items() if c not in bundle.holder}
        writer = space.writer({"note": "machine"}, bundle.base)
        writer.add(addition)
        self.end(Pending(place, writer, chosen, more), fate)

    def end(self, pending: Pending, fate: int | str) -> None:
        if fate == "seal":
            pending.writer.seal()
            self.sealed(pending.place, pending.chosen, pending.states)
        elif fate == "later":
            self.pending.append(pending)
        else:
            self.kill(pending, int(fate))

    @precondition(lambda self: self.pending)
    @rule()
    def seal(self) -> None:
        """What was begun before other things happened."""
        self.end(self.pending.pop(), "seal")

    def kill(self, pending: Pending, after: int) -> None:
        """The writer, after so many of its steps on the disk; sealed is what has its manifest."""
        before = self.manifests(pending.place)
        left = after
        with pytest.MonkeyPatch.context() as patch:

            def step(call: Callable[..., Any]) -> Callable[..., Any]:
                def inner(*args: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if left < 0:
                        raise Killed
                    return call(*args)

                return inner

            files = pending.writer._files
            for name in ("make", "write", "publish", "sync", "remove"):
                patch.setattr(files, name, step(getattr(files, name)))
            patch.setattr(SegmentWriter, "_undo", lambda self, folder: None)
            patch.setattr("pipeline.store.segments.unsealed.describe_writer", dead)
            with suppress(Killed):
                pending.writer.seal()
        if self.manifests(pending.place) != before:
            self.sealed(pending.place, pending.chosen, pending.states)

    def manifests(self, place: str) -> set[Path]:
        return set((self.folder / place).glob("spaces/*/segments/*/manifest.json"))

    @rule(source=places)
    def push(self, source: str) -> None:
        """Or pull, or merge: all that the other lacks."""
        target = PLACES[1 - PLACES.index(source)]
        assert transfer(self.store(source), self.store(target)).problems == []
        for number, states in self.model[source].items():
            self.sealed(target, [number], sorted(states))

    @rule(place=places, after=st.integers(0, 30))
    def push_killed(self, place: str, after: int) -> None:
        """What has arrived is there, what has not is garbage."""
        target = self.store(PLACES[1 - PLACES.index(place)])
        before = self.manifests(PLACES[1 - PLACES.index(place)])
        left = after
        with pytest.MonkeyPatch.context() as patch:

            def write(*args: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return type(target.files).write(target.files, *args)

            patch.setattr(target.files, "write", write)
            patch.setattr("pipeline.store.segments.unsealed.describe_writer", dead)
            with suppress(Killed):
                transfer(self.store(place), target)
        name = PLACES[1 - PLACES.index(place)]
        arrived = {p.parent.name for p in self.manifests(name) - before}
        for segment in self.space(place).segments():
            if segment.id in arrived:
                self.sealed(name, [NUMBER[k] for k in segment.keys], sorted(segment.states))

    @rule(place=places)
    def gc(self, place: str) -> None:
        """A day later in truth: by then no supplement is being written for a base that was compacted before."""
        self.pending = [p for p in self.pending if p.place != place or p.writer._base is None]
        store = self.store(place)
        collect(store, garbage(store, older_than=0))
        assert garbage(self.store(place), older_than=0).garbage == []

    @rule(place=places)
    def sweep(self, place: str) -> None:
        self.space(place).sweep()

    @rule(place=places)
    def compact(self, place: str) -> None:
        """Afterwards every sample stands once."""
        compact(self.space(place))
        keys = [k for segment in self.space(place).segments() for k in segment.keys]
        assert len(keys) == len(set(keys)) == len(self.model[place])

    @rule(place=places, data=st.data())
    def corrupt(self, place: str, data: st.DataObject) -> None:
        """A flipped byte or a lost file is found, and is no data; after the repair all else is as it was."""
        root = self.folder / place
        unsealed = {p for p in root.glob(SEGMENT) if not (p / "manifest.json").exists()}
        files = [p for p in sorted(root.glob(data.draw(st.sampled_from(VICTIMS)))) if unsealed.isdisjoint(p.parents)]
        if not files:
            return
        victim = files[data.draw(st.integers(0, 99)) % len(files)]
        hurt = self.keys_of(victim, root)
        content = victim.read_bytes()
        if data.draw(st.booleans()) and victim.parent.name != "superseded":  # Without a note an old copy is seen again.
            victim.unlink()
        else:
            at, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.sampled_from([1, 16, 128]))
            victim.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
        try:
            assert self.store(place).verify(deep=True), victim
            self.assert_sound(place, hurt)
        except StoreError as error:
            assert "\n" not in str(error)
        assert repair(str(root)).problems
        assert self.store(place).verify(deep=True) == []
        stored = self.union(place)
        for number, states in list(self.model[place].items()):
            left = stored.get(key(number), set()) & set(STATES)
            assert left == states or (key(number) in hurt and left < states), (victim, number, left, states)
            self.model[place][number] = left
        self.model[place] = {n: s for n, s in self.model[place].items() if s}
        self.gc(place)

    def keys_of(self, file: Path, root: Path) -> set[str]:
        """Samples of the segment that `file` is of."""
        for segment in Store.open(root).spaces()[0].segments():
            if segment.path in file.parents:
                return set(segment.keys)
        return set()

    def union(self, place: str) -> dict[str, set[str]]:
        """Key → all states stored of it, in whichever segment."""
        out: dict[str, set[str]] = {}
        for bundle in bundles(self.space(place).segments()):
            for k in bundle.base.keys:
                out.setdefault(k, set()).update(bundle.holder)
        return out

    def assert_sound(self, place: str, hurt: Collection[str] = ()) -> None:
        """Every sealed state of every sample reads back as it was written, and nothing else is there; of `hurt` keys
        some may be gone."""
        space = self.space(place)
        model = {NUMBER[k]: v & set(STATES) for k, v in self.union(place).items()}
        for number in model.keys() | self.model[place].keys():
            found, expected = model.get(number, set()), self.model[place].get(number, set())
            assert found == expected or (key(number) in hurt and found < expected), (number, found, expected)
        for state in STATES:
            chosen = sorted(n for n, states in model.items() if state in states)
            if not chosen:
                continue
            expected = some(chosen, [state])
            plan = space.plan(expected.keys, [state], list(expected.columns), max_block_bytes=200)
            parts = [read_block(block) for block in plan.blocks]
            for i, k in enumerate(expected.keys):
                part = parts[plan.block[i]]
                assert part.keys[plan.slot[i]] == k
            # Blocks hold each sample once: put in the model's order they are the model's samples.
            for part in parts:
                part.lengths = {stream_of(state): part.lengths[stream_of(state)]}
                assert_equal(part, some([NUMBER[k] for k in part.keys], [state]))

    @invariant()
    def both_hold_what_the_model_says(self) -> None:
        for place in PLACES if hasattr(self, "folder") else ():
            self.assert_sound(place)


Machine.TestCase.settings = settings(
    max_examples=int(os.environ.get("MACHINES", "15")),
    stateful_step_count=int(os.environ.get("STEPS", "12")),
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # A failure prints its steps; making them fewer takes minutes.
    suppress_health_check=list(HealthCheck),
)
test_two_stores = Machine.TestCase
