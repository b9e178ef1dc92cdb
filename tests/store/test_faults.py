"""Random flips, deletions and truncations over every file of a store; interrupted copies between stores."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from pipeline.store import Samples, Store, StoreError, read_block
from pipeline.store.files.places import _remote
from pipeline.store.segments.blocks import _segment
from pipeline.store.upkeep.repair import repair
from pipeline.store.upkeep.transfer import transfer
from tests.store import servers
from tests.store.helpers import IDENTITY, assert_equal, key, samples, sealed
from tests.store.test_places import content, fill, use_cache

STATES, COLUMNS = ["encoder.3", "decoder.1"], ["encoder.ids", "decoder.ids"]
KEYS = [key(n) for n in range(12)]


def read(store: Path) -> list[Samples]:
    _segment.cache_clear()
    (home,) = Store.open(store).spaces()
    home.load_table("rte", "train")
    return [read_block(block) for block in home.plan(KEYS, STATES, COLUMNS).blocks]


def damage(victim: Path, pick: random.Random) -> str:
    """Flip a bit of the file, cut it or delete it; says what was done."""
    data = victim.read_bytes()
    kind = pick.choice(["flip", "flip", "delete", "truncate"])
    if kind == "flip":
        place, bit = pick.randrange(len(data)), pick.randrange(8)
        victim.write_bytes(data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :])
        return f"flip bit {bit} of byte {place} of"
    if kind == "truncate":
        left = pick.randrange(len(data))
        victim.write_bytes(data[:left])
        return f"cut to {left} of {len(data)} bytes"
    victim.unlink()
    return "delete"


def test_random_faults(tmp_path: Path) -> None:
    """Found by the deep verification, and never handed out as data. A thousand: `FAULTS=1000 pytest …`."""
    fill(tmp_path)
    store = tmp_path / "store"
    expected = read(store)
    pick = random.Random(0)
    files = sorted(p for p in store.rglob("*") if p.is_file())
    for number in range(int(os.environ.get("FAULTS", "100"))):
        victim = pick.choice(files)
        data = victim.read_bytes()
        what = f"{number}: {damage(victim, pick)} {victim.relative_to(store)}"
        try:
            assert Store.open(store).verify(deep=True), what
        except StoreError as error:
            assert "\n" not in str(error), what
        try:
            found = read(store)
        except (StoreError, ValueError) as error:
            assert isinstance(error, StoreError) or "unpack" in str(error), what
        else:
            for mine, theirs in zip(found, expected, strict=False):
                assert_equal(mine, theirs)
        victim.write_bytes(data)
    assert Store.open(store).verify(deep=True) == []


def test_repair_of_random_damage_keeps_what_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small chunks most samples survive, each bit for bit."""
    monkeypatch.setattr("pipeline.store.format.arrays.CHUNK_BYTES", 64)
    fill(tmp_path)
    store = tmp_path / "store"
    pick = random.Random(1)
    chunks = sorted(store.glob("spaces/*/segments/*/*/c.*"))
    for victim in pick.sample(chunks, 3):
        data = victim.read_bytes()
        victim.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    done = repair(str(store))
    assert done.moved and 0 < done.lost < 12
    opened = Store.open(store)
    assert opened.verify(deep=True) == []
    (home,) = opened.spaces()
    sound = [n for n in range(12) if home.stored().get(key(n), frozenset()) >= {*STATES, *COLUMNS}]
    assert 0 < len(sound) < 12
    for number in sound:
        plan = home.plan([key(number)], STATES, COLUMNS)
        assert_equal(read_block(plan.blocks[0]), samples([number]))


class Stop(BaseException):
    """As a kill: no code of ours catches it."""


def flaky(files: Any, pick: random.Random) -> None:
    """Make one of the next operations fail."""
    left = pick.randrange(1, 120)

    def wrap(call: Any) -> Any:
        def inner(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Stop
            return call(*args, **options)

        return inner

    for name in ("write", "publish", "move", "read", "remove"):
        setattr(files, name, wrap(getattr(files, name)))


def test_interrupted_push_pull_and_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """first → bucket ← second, bucket → copy; each interrupted at random until it is done. All end with equal bytes."""
    use_cache(monkeypatch, tmp_path, "0")
    pick = random.Random(2)
    first = fill(tmp_path / "first")
    second = Store.create(tmp_path / "second" / "store")
    home = second.create_space({**IDENTITY, "weights": "ab" * 16})
    sealed(home, [100, 101, 102])
    stops = 0

    def insist(source: str, target: str) -> None:
        nonlocal stops
        for _ in range(200):
            begin = Store.open(source)
            end = Store.open(target, create=True)
            for name in ("write", "publish", "move", "read", "remove"):
                end.files.__dict__.pop(name, None)
            flaky(end.files, pick)
            try:
                assert not transfer(begin, end).problems
                for name in ("write", "publish", "move", "read", "remove"):
                    end.files.__dict__.pop(name, None)
                return
            except Stop:
                stops += 1
                # The process that was killed is dead to the next one.
                monkeypatch.setattr("pipeline.store.segments.unsealed.is_dead", lambda writer: True)
                for name in ("write", "publish", "move", "read", "remove"):
                    end.files.__dict__.pop(name, None)
        raise AssertionError("never done")

    with servers.s3(tmp_path / "s3") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        _remote.cache_clear()
        for source, target in (
            (first.where, "s3://team/x"),
            (second.where, "s3://team/x"),
            ("s3://team/x", str(tmp_path / "copy")),
            (second.where, first.where),
        ):
            insist(source, target)
        bucket = content(tmp_path / "s3" / "team" / "x")
    assert stops > 2
    # What a killed pull has gathered is garbage for `gc`, not part of the store.
    copy = {name: data for name, data in content(tmp_path / "copy").items() if "/." not in name and name[0] != "."}
    merged = {n: d for n, d in content(tmp_path / "first" / "store").items() if "/." not in n and n[0] != "."}
    assert bucket == copy == merged
    for place in (tmp_path / "copy", tmp_path / "first" / "store"):
        assert Store.open(place).verify(deep=True) == []
