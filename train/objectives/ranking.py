"""Scores of retrieval: every distinct sample of a slot ranks all those of the other one.

A query is found at rank r where r candidates that do not belong to it come before the best of those that do; of equal
similarity they do, so that embeddings which are all alike find nothing. R@K is the share of queries found among the
first K, in per cent; rsum the sum of R@1, 5 and 10 both ways (Chen et al., CVPR 2021; 600 at most).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.extract.batch import Batch
from pipeline.store.errors import UserError
from pipeline.train.objectives.base import Outputs, Scorer

AT = (1, 5, 10)
CHUNK = 1024  # queries ranked at a time


def directions(slots: Sequence[str]) -> tuple[str, str]:
    """What both ways are called: i2t and t2i for image and text; by whole names where the first letters are alike."""
    a, b = slots
    return (f"{a[0]}2{b[0]}", f"{b[0]}2{a[0]}") if a[0] != b[0] else (f"{a}_to_{b}", f"{b}_to_{a}")


def figures_of(slots: Sequence[str], folds: int = 1) -> tuple[str, ...]:
    """The names of all figures, in the order in which they are told."""
    ways = directions(slots)
    found = (*(f"{way}_r{k}" for way in ways for k in AT), "rsum", *(f"{way}_median" for way in ways))
    return (*found, *(f"fold_{name}" for name in found)) if folds > 1 else found


def ranks(queries: Tensor, candidates: Tensor, pairs: np.ndarray) -> np.ndarray:
    """(n,) int64, from 0: the rank of each of `queries` (n, D) among `candidates` (m, D). `pairs`: (p, 2) int64, which
    query and which candidate belong together; each query has one at least."""
    order = np.argsort(pairs[:, 0], kind="stable")
    pairs = pairs[order]
    out = np.zeros(len(queries), np.int64)
    for at in range(0, len(queries), CHUNK):
        similar = queries[at : at + CHUNK] @ candidates.t()
        begin, end = np.searchsorted(pairs[:, 0], [at, at + len(similar)])
        own = torch.zeros(similar.shape, dtype=torch.bool)
        own[torch.from_numpy(pairs[begin:end, 0] - at), torch.from_numpy(pairs[begin:end, 1])] = True
        best = similar.masked_fill(~own, -torch.inf).max(1, keepdim=True).values
        out[at : at + len(similar)] = ((similar >= best) & ~own).sum(1).numpy()
    return out


def scores(embedded: Sequence[Tensor], pairs: np.ndarray, ways: Sequence[str]) -> dict[str, float]:
    """The figures of two slots, `embedded` (n, D) and (m, D), whose `pairs` (p, 2) belong together."""
    found: dict[str, float] = {}
    medians: dict[str, float] = {}
    for way, (a, b) in zip(ways, ((0, 1), (1, 0)), strict=True):
        rank = ranks(embedded[a], embedded[b], pairs[:, (a, b)])
        found |= {f"{way}_r{k}": 100 * float((rank < k).mean()) for k in AT}
        medians[f"{way}_median"] = float(np.floor(np.median(rank))) + 1
    return {**found, "rsum": sum(found.values()), **medians}


def folded(embedded: Sequence[Tensor], pairs: np.ndarray, ways: Sequence[str], folds: int) -> dict[str, float]:
    """The mean of `scores` over `folds` parts of the slot with fewer samples, in their order, each with those of the
    other slot that belong to it: on COCO's 5,000 images and 5 folds the "1K" protocol. UserError where a part would be
    empty."""
    few = int(len(embedded[1]) < len(embedded[0]))
    if len(embedded[few]) < folds:
        raise UserError(
            f"--eval-folds {folds}: the split has {len(embedded[few])} distinct samples, too few for so many parts"
        )
    told: list[dict[str, float]] = []
    for part in np.array_split(np.arange(len(embedded[few])), folds):
        here = pairs[np.isin(pairs[:, few], part)]
        kept = [np.unique(here[:, side], return_inverse=True) for side in (0, 1)]
        own = [embedded[side][torch.from_numpy(kept[side][0])] for side in (0, 1)]
        told.append(scores(own, np.stack([which.reshape(-1) for _, which in kept], 1), ways))
    return {f"fold_{name}": float(np.mean([fold[name] for fold in told])) for name in told[0]}


class RankScorer(Scorer):
    """Embeddings of a split, `embedding` (m, D) of a batch of one slot, and the figures of all against all. `names`:
    those that are told; `first` selects the best epoch. Holds the embeddings of the split, 4 · D bytes a sample."""

    each = True

    def __init__(self, slots: Sequence[str], folds: int, names: Sequence[str], first: str = "rsum") -> None:
        self.slots, self.folds, self.names, self._first = tuple(slots), folds, tuple(names), first
        self._seen: dict[str, list[tuple[np.ndarray, Tensor, np.ndarray, np.ndarray]]] = {slot: [] for slot in slots}

    @property
    def first(self) -> str:
        return self._first

    def value(self, figures: Mapping[str, float]) -> float:
        found = super().value(figures)
        return -found if self.first.endswith("_median") else found

    def update(self, out: Outputs, batch: Batch) -> None:
        assert batch.targets is not None
        (slot,) = batch.ids
        rows, count = (batch.targets[name].cpu().numpy() for name in ("row", "row.n"))
        self._seen[slot].append((batch.index, out["embedding"].float(), rows, np.repeat(batch.index, count)))

    def merge(self, other: Any) -> None:
        for slot, seen in other._seen.items():
            self._seen[slot] += seen

    def compute(self) -> dict[str, float]:
        embedded, places = [], []
        for seen in self._seen.values():
            index, vectors = np.concatenate([part[0] for part in seen]), torch.cat([part[1] for part in seen])
            embedded.append(vectors[torch.from_numpy(np.argsort(index, kind="stable"))])
            rows, numbers = (np.concatenate([part[k] for part in seen]) for k in (2, 3))
            places.append(numbers[np.argsort(rows, kind="stable")])
        pairs, ways = np.unique(np.stack(places, 1), axis=0), directions(self.slots)
        found = scores(embedded, pairs, ways)
        if self.folds > 1:
            found |= folded(embedded, pairs, ways, self.folds)
        return {name: found[name] for name in dict.fromkeys((*self.names, self.first))}
