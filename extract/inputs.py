"""`Inputs`: what a backbone is fed, ragged, and the key each sample is known by in every store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash

from pipeline.extract.batch import Batch, stream_of
from pipeline.store.format.samples import offsets_of, rows_of


def ragged(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ints → ((rows,) int32 back to back, (n,) int64 lengths)."""
    lengths = np.fromiter((len(s) for s in sequences), np.int64, len(sequences))
    flat = np.fromiter((x for s in sequences for x in s), np.int32, int(lengths.sum()))
    return flat, lengths


@dataclass
class Inputs:
    """Integer inputs of n samples. `lengths`: stream → (n,) int64; `columns`: name → (rows,) int32, back to back.

    `truncated`: (n,) bool, samples whose text was cut at the length limit. `pictures`: (n,) `Picture` objects of an
    image backbone, which are its input; its columns hold the sizes of feature maps only. `skipped`: why samples that
    were asked for are not here, by their place in what was asked for. `metas`: what is known of each sample beside its
    inputs (which words they are), () where nothing is. `of`: (n,) the row that each sample is of, where a row may be
    several samples; empty where each is one.
    """

    lengths: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]
    truncated: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    pictures: np.ndarray | None = None
    skipped: dict[int, str] = field(default_factory=dict)
    metas: Sequence[Mapping[str, Any]] = ()
    of: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(next(iter(self.lengths.values())))

    def take(self, samples: np.ndarray) -> Inputs:
        """The inputs of `samples` (k,), in that order."""
        samples = np.asarray(samples, np.int64)
        rows = {stream: rows_of(offsets_of(lengths), samples) for stream, lengths in self.lengths.items()}
        return Inputs(
            {s: n[samples] for s, n in self.lengths.items()},
            {name: c[rows[stream_of(name)]] for name, c in self.columns.items()},
            self.truncated[samples] if len(self.truncated) else self.truncated,
            None if self.pictures is None else self.pictures[samples],
            metas=[self.metas[i] for i in samples.tolist()] if self.metas else (),
            of=self.of[samples] if len(self.of) else self.of,
        )

    @classmethod
    def concat(cls, parts: Sequence[Inputs]) -> Inputs:
        """Several inputs of one family, one after the other."""
        first = parts[0]
        return cls(
            {s: np.concatenate([p.lengths[s] for p in parts]) for s in first.lengths},
            {c: np.concatenate([p.columns[c] for p in parts]) for c in first.columns},
            np.concatenate([p.truncated for p in parts]),
            None if first.pictures is None else np.concatenate([p.pictures for p in parts if p.pictures is not None]),
            metas=[meta for p in parts for meta in p.metas],
        )

    def keys(self) -> list[str]:
        """The sample keys: xxh3-128 over every column's name, length and values; of an image, what it is known by.
        Row number and label play no part."""
        if self.pictures is not None:
            return [p.key for p in self.pictures]
        bounds = {s: offsets_of(n) for s, n in self.lengths.items()}
        columns = sorted(self.columns.items())
        raw = {name: np.ascontiguousarray(c, "<i4") for name, c in columns}
        keys = []
        for i in range(len(self)):
            h = xxhash.xxh3_128()
            for name, _ in columns:
                low, high = bounds[stream_of(name)][i : i + 2]
                h.update(f"{name}:{high - low}:".encode())
                h.update(raw[name][low:high].tobytes())
            keys.append(h.hexdigest())
        return keys

    def tokens(self) -> np.ndarray:
        """(n,) int64: positions over all streams, the measure of a sample's cost; of an image, those of its coarsest
        map."""
        if self.pictures is not None:
            return np.min([n for s, n in self.lengths.items() if s != "grid"], axis=0)
        return np.sum(list(self.lengths.values()), axis=0)

    def batch(self, device: torch.device | str = "cpu") -> Batch:
        """The same inputs as a `Batch` without states."""
        columns = {k: torch.from_numpy(v.astype(np.int64)).to(device) for k, v in self.columns.items()}
        pictures = None if self.pictures is None else list(self.pictures)
        lengths = {s: np.asarray(n) for s, n in self.lengths.items()}
        return Batch({}, columns, lengths, index=np.arange(len(self)), pictures=pictures)
