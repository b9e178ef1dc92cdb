"""Eight processes extract overlapping samples into one store without a lock; and a disk that fills up."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.extract.extraction import compute
from pipeline.store import Store, StoreError
from pipeline.store.upkeep.rewrite import compact
from pipeline.store.upkeep.usage import collect, garbage
from tests.extract.kills import STATES, Killing, content

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here: not raced")


def test_eight_writers_of_overlapping_samples(tmp_path: Path) -> None:
    killing = Killing.prepare(tmp_path, samples=60)
    store = tmp_path / "store"
    children = []
    for number in range(8):
        child = os.fork()
        if not child:
            code = 1
            try:
                mine = np.random.default_rng(number).permutation(60)[:40]
                space = Store.open(store, create=True).create_space(killing.identity)
                part, keys = killing.inputs.take(mine), [killing.keys[i] for i in mine]
                options = {"tokens": 1, "batch_size": 1, "quiet": True, "segment_bytes": 20_000}
                compute(space, part, keys, STATES, killing.live, **options)  # type: ignore[arg-type]
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    killing.extract(store)  # What none of them drew.
    opened = Store.open(store)
    (space,) = opened.spaces()
    assert sum(len(s) for s in space.segments()) > len(killing.keys)
    assert not [p for p in store.rglob("*") if "lock" in p.name]
    assert compact(space)["samples"] == len(killing.keys)
    collect(opened, garbage(opened, older_than=0))
    killing.extract(tmp_path / "alone")
    assert content(store) == content(tmp_path / "alone")  # `content` refuses a sample that stands there twice.
    assert len(list(store.glob("spaces/*/segments/*"))) == 1 and opened.verify(deep=True) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, 64 MB large."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount command: a full disk is not tested")
    if mounted.returncode:
        pytest.skip("mounting is not permitted here: a full disk is not tested")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    killing = Killing.prepare(tmp_path, samples=60)
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * (63 << 20))
    store = small_disk / "store"
    with pytest.raises(StoreError, match=r"disk full while .* needed.*free some space"):
        killing.extract(store)
    opened = Store.open(store)
    (space,) = opened.spaces()
    before = set(space.stored())
    assert opened.verify(deep=True) == [] and 0 < len(before) < len(killing.keys)
    ballast.unlink()
    assert killing.extract(store) == len(killing.keys) - len(before)
    killing.extract(tmp_path / "alone")
    assert content(store) == content(tmp_path / "alone")
