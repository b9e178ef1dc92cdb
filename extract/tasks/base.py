"""What a task is: its description (`TaskSpec`), its rows, and the splits that are there.

The text-to-text form (`prompt`, `targets`) is what T5 reads and answers; a single-stream encoder uses the raw text
fields and a head of `len(labels)` outputs. Both come from the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from pipeline.store.errors import UserError

SPLITS = ("train", "validation", "test")
SPLIT_SEED = 42  # of the LST / SHERL protocol; never the run's seed, so that every seed sees the same splits

Label = int | float | None


class TaskError(UserError):
    """A task, its files or its rows are not usable as asked."""


@dataclass(frozen=True)
class TaskSpec:
    """A task without its rows. It travels in the header of a task table (`to_dict`, `from_dict`).

    `labels`: class names in index order, () for regression. `metrics`: names known to `train.metrics`; their mean
    selects the best epoch. `fields`: names of the one or two text fields. `prompt`: text-to-text source with {0} and
    {1} for the fields. `targets`: the text a text-to-text model must answer, per class, or per value of the grid for
    regression. `values`: the number each regression target stands for, evenly spaced; () for classification.
    Raises `TaskError` where these do not fit together.
    """

    name: str
    kind: Literal["classification", "regression"]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    fields: tuple[str, ...]
    prompt: str
    targets: tuple[str, ...]
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("classification", "regression"):
            raise TaskError(f"task {self.name}: kind must be classification or regression, not {self.kind!r}")
        answers, what = (self.labels, "labels") if self.kind == "classification" else (self.values, "values")
        if len(answers) < 2:
            raise TaskError(f"task {self.name}: {what} must have at least two entries, there are {len(answers)}")
        if len(self.targets) != len(answers):
            raise TaskError(f"task {self.name}: {len(self.targets)} targets for {len(answers)} {what}")
        if len(set(self.targets)) != len(self.targets):
            raise TaskError(f"task {self.name}: targets must differ from each other")
        if len(self.fields) not in (1, 2):
            raise TaskError(f"task {self.name}: one or two text fields, not {len(self.fields)}")

    def source(self, texts: Sequence[str]) -> str:
        """The text-to-text source of one row's fields."""
        return self.prompt.format(*texts)

    def target_index(self, label: int | float) -> int:
        """The place in `targets` of a label: the class itself, or the nearest grid value (a half goes to the even
        neighbour, as `np.round` does: 4.25 on the 0.1 grid is "4.2"). Values outside the grid go to its ends."""
        return int(label) if self.kind == "classification" else nearest(self.values, float(label))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TaskSpec:
        """The inverse of `to_dict`; keys that are not of a spec are ignored. Raises `TaskError` for a missing key."""
        names = ("name", "kind", "labels", "metrics", "fields", "prompt", "targets", "values")
        absent = [n for n in names if n not in data]
        if absent:
            raise TaskError(f"task description lacks {', '.join(absent)}")
        known: dict[str, Any] = {n: tuple(data[n]) if isinstance(data[n], list) else data[n] for n in names}
        return cls(**known)


def nearest(values: Sequence[float], number: float) -> int:
    """The place of the nearest of evenly spaced `values`; a half goes to the even neighbour, what is outside to the
    ends."""
    per_unit = (len(values) - 1) / (values[-1] - values[0])
    place = int(np.rint(number * per_unit)) - int(np.rint(values[0] * per_unit))
    return min(max(place, 0), len(values) - 1)


@dataclass
class Rows:
    """Rows of one split, in the order they are always visited. `labels[i]` is a class index, a value or None."""

    texts: list[tuple[str, ...]]
    labels: list[Label]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, places: Sequence[int]) -> Rows:
        """The rows at `places`, in that order."""
        return Rows([self.texts[i] for i in places], [self.labels[i] for i in places])

    def head(self, limit: int | None) -> Rows:
        """The first `limit` rows (all where None): a smaller limit is a prefix of a larger one. `TaskError` below 1."""
        if limit is None:
            return self
        if limit < 1:
            raise TaskError(f"limit must be at least 1, not {limit}")
        return Rows(self.texts[:limit], self.labels[:limit])

    def labelled(self) -> bool:
        """True where every row has a label."""
        return all(label is not None for label in self.labels)


@dataclass
class Task:
    """A task with the splits that are there. `absent` says, for a split that is not, why and what to do.

    `provenance`: dataset, revision, licence, source and split rule; nothing of the machine it was read on. `origin`: a
    digest of the machine and the places that it was read from, "" where there are none: rows of one origin are
    editions of one thing, others only share a name.
    """

    spec: TaskSpec
    splits: dict[str, Rows]
    provenance: dict[str, Any]
    absent: dict[str, str] = field(default_factory=dict)
    origin: str = ""

    def rows(self, split: str) -> Rows:
        """The rows of `split`. Raises `TaskError` saying why it is not there and which splits are."""
        if split in self.splits:
            return self.splits[split]
        there = ", ".join(self.splits) or "none"
        why = self.absent.get(split, "no such split")
        raise TaskError(f"task {self.spec.name} has no {split} rows: {why}; splits there: {there}")


def fixed_order(n: int) -> list[int]:
    """The permutation of the protocol: `torch.randperm(n)` with seed 42."""
    import torch  # the protocol's draw is torch's; whoever lists tasks does without

    return torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
