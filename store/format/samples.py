"""`Samples`: a run of whole samples as stored, the one container that is written and read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.store.format.formats import Encoded
from pipeline.store.format.keys import Keys
from pipeline.store.format.names import is_state, is_stream, stream_of


@dataclass
class Samples:
    """n samples; the arrays of a stream hold one row a position, samples back to back.

    `keys`: n sample keys, as text or as `Keys`. `lengths`: stream → (n,) int64. `states`: name → encoded rows.
    `columns`: name → (rows,) int32.
    """

    keys: Sequence[str]
    lengths: dict[str, np.ndarray]
    states: dict[str, Encoded] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        """Bytes of states, scales and columns."""
        return sum(e.nbytes for e in self.states.values()) + sum(c.nbytes for c in self.columns.values())

    def offsets(self, stream: str) -> np.ndarray:
        """(n + 1,) int64: sample i's rows are `offsets[i]` to `offsets[i + 1]`."""
        return offsets_of(self.lengths[stream])

    def check(self) -> None:
        """Raises ValueError if names, types or row counts do not fit together."""
        Keys.of(self.keys)
        rows: dict[str, int] = {}
        for stream, lengths in self.lengths.items():
            if not is_stream(stream) or np.shape(lengths) != (len(self.keys),) or np.any(np.asarray(lengths) < 0):
                raise ValueError(f"lengths of stream {stream!r} must be ({len(self.keys)},) and not negative")
            rows[stream] = int(np.asarray(lengths, dtype=np.int64).sum())
        counts = {name: state.rows for name, state in self.states.items()}
        counts |= {name: len(column) for name, column in self.columns.items()}
        for name, count in counts.items():
            if not is_state(name) or stream_of(name) not in rows:
                raise ValueError(f"{name!r} does not name a state or column of a stream in {sorted(rows)}")
            if count != rows[stream_of(name)]:
                raise ValueError(f"{name} has {count} rows, its stream has {rows[stream_of(name)]}")
        for name, column in self.columns.items():
            if column.dtype != np.int32 or column.ndim != 1:
                raise ValueError(f"column {name} must be (rows,) int32, not {column.dtype} {column.shape}")


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """(n,) lengths → (n + 1,) int64 row offsets."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def rows_of(offsets: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """The rows of `samples` (k,), one sample after another, (rows,) int64. `offsets`: (n + 1,) of all samples."""
    start = offsets[samples]
    lengths = offsets[samples + 1] - start
    shift = start - (np.cumsum(lengths) - lengths)
    return np.arange(int(lengths.sum()), dtype=np.int64) + np.repeat(shift, lengths)


def side_by_side(parts: Iterable[Samples]) -> Samples:
    """The same samples with the states and columns of all `parts`, one at least; the first part's lengths hold."""
    out, *others = parts
    for part in others:
        out.lengths = {**part.lengths, **out.lengths}
        out.states |= part.states
        out.columns |= part.columns
    return out
