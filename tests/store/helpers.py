"""Small samples and stores for the tests of the store."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from pipeline.extract.encoding import encode
from pipeline.store import Samples, Segment, Space, Store, digest_bytes

IDENTITY = {"format": "float16", "format_version": 1, "backbone": {"family": "t5", "name": "tiny"}, "max_length": 128}

T = TypeVar("T")


def most_memory(make: Callable[[], T]) -> tuple[T, int]:
    """What `make` gives, and the most bytes that Python and NumPy held for it at a time."""
    tracemalloc.start()
    try:
        return make(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def key(number: int) -> str:
    return digest_bytes(str(number).encode())


def samples(
    numbers: list[int],
    states: tuple[str, ...] = ("encoder.3", "decoder.1"),
    fmt: str = "float16",
    width: int = 8,
    columns: bool = True,
    large: bool = True,
) -> Samples:
    """Samples whose content depends only on their number; every third has a value beyond float16 if `large`."""
    streams = list(dict.fromkeys(name.split(".")[0] for name in states))
    lengths = {s: np.array([(n * (3 + i)) % 5 + i for n in numbers], np.int64) for i, s in enumerate(streams)}
    out = Samples([key(n) for n in numbers], lengths)
    for name in states:
        rows = []
        for n, length in zip(numbers, lengths[name.split(".")[0]], strict=True):
            generator = torch.Generator().manual_seed(n * 1000 + sum(name.encode()))
            x = torch.randn(int(length), width, generator=generator)
            rows.append(x * 1e5 if large and n % 3 == 0 else x)
        out.states[name] = encode(torch.cat(rows), fmt).numpy()
    for stream in streams if columns else []:
        ids = [np.arange(length, dtype=np.int32) + n for n, length in zip(numbers, lengths[stream], strict=True)]
        out.columns[f"{stream}.ids"] = np.concatenate(ids)
    return out


def space(path: Path, **identity: object) -> Space:
    return Store.create(path / "store").create_space({**IDENTITY, **identity})


def sealed(space: Space, numbers: list[int], base: Segment | None = None, **options: object) -> Segment:
    writer = space.writer({"note": "test"}, base)
    writer.add(samples(numbers, **options))  # type: ignore[arg-type]
    return writer.seal()


def assert_equal(found: Samples, expected: Samples) -> None:
    """Same samples, bit for bit."""
    assert found.keys == expected.keys
    assert found.lengths.keys() == expected.lengths.keys()
    for stream in expected.lengths:
        np.testing.assert_array_equal(found.lengths[stream], expected.lengths[stream])
    assert found.states.keys() == expected.states.keys()
    for name, state in expected.states.items():
        other = found.states[name]
        assert other.values.dtype == state.values.dtype
        np.testing.assert_array_equal(other.values, state.values, name)
        zeros = np.zeros(state.rows, np.int8)
        mine, theirs = (zeros if e.scale is None else e.scale for e in (state, other))
        np.testing.assert_array_equal(mine, theirs, name)
    assert found.columns.keys() == expected.columns.keys()
    for name, column in expected.columns.items():
        np.testing.assert_array_equal(found.columns[name], column)


def snapshot(path: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below `path` with size and time of change."""
    return {str(entry.relative_to(path)): (entry.stat().st_size, entry.stat().st_mtime_ns) for entry in path.rglob("*")}
