"""What a task is: its description (`TaskSpec`), its rows, and the splits that are there.

The text-to-text form (`prompt`, `targets`) is what T5 reads and answers; a single-stream encoder uses the raw text
fields and a head of `len(labels)` outputs. Both come from the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

import numpy as np

from pipeline.store.errors import UserError
from pipeline.store.format.digest import digest_json

SPLITS = ("train", "validation", "test")
# What data sets call them.
SPLIT_NAMES: dict[str, str] = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation",
               "dev": "validation", "test": "test"}  # fmt: skip
SPLIT_SEED = 42  # of the LST / SHERL protocol; never the run's seed, so that every seed sees the same splits

Label = int | float | list[int] | list[dict[str, Any]] | bytes | None  # the target of a row, of its task's type
TargetType = Literal["class", "number", "classes", "tags", "tokens", "mask", "boxes", "instances", "pair", "none"]
DENSE = ("mask", "boxes", "instances")  # types of target that say where in an image something is
# What format 1 of task tables called a task by, which the versions of such tasks are still digests of.
_KINDS = {"class": "classification", "number": "regression"}


class TaskError(UserError):
    """A task, its files or its rows are not usable as asked."""


def by_split(names: Iterable[str], where: object, known: Mapping[str, str] = SPLIT_NAMES) -> dict[str, str]:
    """Split → the one of `names`, found in `where`, that `known` says it is called by; others are left out. `TaskError`
    where two are: which one is meant?"""
    found: dict[str, str] = {}
    for name in names:
        if name in known and found.setdefault(known[name], name) != name:
            two = f"{found[known[name]]} and {name}"
            raise TaskError(f"{where}: {two} are both {known[name]}, which one is meant? Keep one of them")
    return found


@dataclass(frozen=True)
class TaskSpec:
    """A task without its rows. It travels in the header of a task table (`to_dict`, `from_dict`).

    `target`: the type of a row's target: an index into `labels` (class), a number, a list of such indices (classes:
    any number of them; tags: one for each word of the text), an image of such indices as the bytes of a PNG file
    (mask), the objects in an image (boxes; instances, with their outlines; see `tasks.objects`), tokens of the text
    itself, that what several slots read of a row belongs together (pair; of these two a row has no label), or none.
    `labels`: names in index order, () for numbers. `metrics`: names known to `train.metrics` for a class or a number;
    their mean selects the best epoch. `fields`: names of the one or two text fields. `prompt`: text-to-text source with
    {0} and {1} for the fields. `texts`: what a text-to-text model must answer, per class, or per value of the grid for
    a number; () for other targets. `values`: the number each of these stands for, evenly spaced; of masks and of
    objects the number that their files know each class by (of masks ascending, where these are not 0, 1, 2, …); () of
    other targets. Raises `TaskError` where these do not fit together.
    """

    name: str
    target: TargetType
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    fields: tuple[str, ...]
    prompt: str
    texts: tuple[str, ...] = ()
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.target not in get_args(TargetType):
            types = ", ".join(get_args(TargetType))
            raise TaskError(f"task {self.name}: the type of a target is one of {types}, not {self.target!r}")
        answers, what = (self.values, "values") if self.target == "number" else (self.labels, "labels")
        least = {"classes": 1, "boxes": 1, "instances": 1, "tokens": 0, "pair": 0, "none": 0}.get(self.target, 2)
        if len(answers) < least:
            raise TaskError(f"task {self.name}: at least {least} {what} are needed, there are {len(answers)}")
        if self.target in _KINDS and len(self.texts) != len(answers):
            raise TaskError(f"task {self.name}: {len(self.texts)} texts to answer for {len(answers)} {what}")
        if len(set(self.texts)) != len(self.texts):
            raise TaskError(f"task {self.name}: texts to answer must differ from each other")
        if self.target == "tags" and len(self.fields) != 1:
            raise TaskError(f"task {self.name}: tags are of the words of one text field, not of {len(self.fields)}")
        if self.target == "mask" and self.values and len(self.values) != len(self.labels):
            raise TaskError(f"task {self.name}: {len(self.values)} numbers of {len(self.labels)} classes of masks")
        if len(self.fields) not in (1, 2):
            raise TaskError(f"task {self.name}: one or two text fields, not {len(self.fields)}")

    def source(self, texts: Sequence[str]) -> str:
        """The text-to-text source of one row's fields."""
        return self.prompt.format(*texts)

    def target_index(self, label: int | float) -> int:
        """The place in `texts` of a label: the class itself, or the nearest grid value (a half goes to the even
        neighbour, as `np.round` does: 4.25 on the 0.1 grid is "4.2"). Values outside the grid go to its ends."""
        return int(label) if self.target == "class" else nearest(self.values, float(label))

    def named(self, label: Label) -> str:
        """A target as people read it: names of classes, or the number."""
        if isinstance(label, bytes):
            return f"a mask of {len(label):,} bytes"
        if self.target in ("boxes", "instances") and isinstance(label, list):
            return f"{len(label):,} objects"
        if self.target == "number" or label is None:
            return "none" if label is None else f"{label:g}"
        indices: list[Any] = label if isinstance(label, list) else [label]
        return ", ".join(self.labels[int(i)] for i in indices) or "nothing"

    def version(self, provenance: dict[str, Any]) -> str:
        """What the rows of this task from `provenance` are known by in stores and runs."""
        known = self.to_dict()
        if self.target in _KINDS:
            known["kind"], known["targets"] = _KINDS[known.pop("target")], known.pop("texts")
        return digest_json([known, provenance])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TaskSpec:
        """The inverse of `to_dict`; keys that are not of a spec are ignored. Raises `TaskError` for a missing key."""
        names = tuple(f.name for f in fields(cls))
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
    """Rows of one split, in the order they are always visited. `labels[i]` is the row's target, None for none. `ids`:
    what the user calls each row, [] where they have no names."""

    texts: list[tuple[str, ...]]
    labels: list[Label]
    ids: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, places: Sequence[int]) -> Rows:
        """The rows at `places`, in that order."""
        ids = [self.ids[i] for i in places] if self.ids else []
        return Rows([self.texts[i] for i in places], [self.labels[i] for i in places], ids)

    def head(self, limit: int | None) -> Rows:
        """The first `limit` rows (all where None): a smaller limit is a prefix of a larger one. `TaskError` below 1."""
        if limit is None:
            return self
        if limit < 1:
            raise TaskError(f"limit must be at least 1, not {limit}")
        return Rows(self.texts[:limit], self.labels[:limit], self.ids[:limit])

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

    @property
    def version(self) -> str:
        """What its rows are known by, see `TaskSpec.version`."""
        return self.spec.version(self.provenance)

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
