"""What an objective is, and the register of objectives.

An objective is the one place that knows what a target is: how it becomes numbers, which head learns it with which
loss, how predictions are scored and how they are told to people. Adding one means adding a file with a config, a
subclass of `Objective` with its `Head`, and `@register_objective("name", ConfigClass)`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.extract.batch import Batch
from pipeline.extract.plugins import load_installed
from pipeline.store.errors import UserError
from pipeline.store.near import near
from pipeline.train.configs import ObjectiveConfig
from pipeline.train.features import Feature, Features, Want
from pipeline.train.metrics import ERRORS

Outputs = dict[str, Any]  # name → tensor with a first dimension of B, or a sequence of B entries


class Vocabulary(Protocol):
    """What has a language-model head: a tail, or a live backbone."""

    def logits(self, rows: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(rows, width) → (rows, vocabulary), or only the columns `tokens`."""


@dataclass(frozen=True)
class Answers:
    """What a task says of its targets. `labels`: class names in index order. `metrics`: names known to
    `train.metrics`. For a backbone that writes text, `texts`: what it answers, and `token_ids` of each; `values`: the
    number each text stands for, where targets are numbers; of masks and objects the numbers of the classes, see
    `TaskSpec`. `continued`: an answer goes on with the sample's own text, in one stream. `slots`: those of a task with
    several."""

    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    token_ids: tuple[tuple[int, ...], ...] = ()
    values: tuple[float, ...] = ()
    continued: bool = False
    slots: tuple[str, ...] = ()

    @classmethod
    def of_classes(cls, classes: int, token_ids: Sequence[Sequence[int]] = ()) -> Answers:
        """Classes without names, where only their number matters."""
        labels = tuple(str(i) for i in range(classes))
        return cls(labels, ("accuracy",), token_ids=tuple(tuple(ids) for ids in token_ids))


class Head(nn.Module):
    """Reads a tuner's features. Computes in float32 unless autocast says otherwise. `training_only`: names of modules
    in it that nothing reads after training."""

    training_only: ClassVar[tuple[str, ...]] = ()

    def begin_step(self, step: int, steps: int, an_epoch: int) -> None:
        """Called before optimizer step `step` of `steps` (from 0), `an_epoch` of which make up an epoch, for losses
        that follow a schedule."""

    def losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        """Weighted terms, scalars, each a mean over what `weight` counts; their sum trains."""
        raise NotImplementedError

    def outlined(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        """`losses` with the same products and without a look at values, which the meta device does not have: what a
        step's operations and memory are counted with."""
        return self.losses(features, batch)

    def weight(self, batch: Batch) -> float:
        """What the batch counts for beside others of one step, in accumulation and over ranks."""
        return float(len(batch))

    def predict(self, features: Features, batch: Batch) -> Outputs:
        """What is told of each sample, without a look at targets."""
        raise NotImplementedError

    def measure(self, features: Features, batch: Batch) -> Outputs:
        """What the scorer reads; the predictions, unless a score needs the targets (perplexity)."""
        return self.predict(features, batch)

    def embed(self, slot: str, features: Features, batch: Batch) -> Tensor:
        """(m, width), the m distinct samples of `slot` in the batch as they are compared with those of other slots; of
        heads that rank."""
        raise NotImplementedError


class Scorer(ABC):
    """Figures over a split, batch by batch; nothing of the size of a split stands in memory but scalars a sample.

    `each`: it is told of every distinct sample of each slot once, slot after slot, instead of the samples of the task,
    which are made of them (`PairSource.each`)."""

    each: ClassVar[bool] = False

    @abstractmethod
    def update(self, out: Outputs, batch: Batch) -> None:
        """Take one batch: what `Head.measure` gave, on the host, and the batch with its targets."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Take what another scorer of the same kind has seen."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The figures, by name."""

    @property
    def first(self) -> str:
        """The figure that selects the best epoch."""
        return "average"

    def value(self, figures: Mapping[str, float]) -> float:
        """What selects the best epoch; larger is better. NaN where the figure is undefined, None in JSON."""
        found = figures[self.first]
        return math.nan if found is None else -found if self.first in ERRORS else found


class Report(ABC):
    """What there is to say of a split beside its figures, in detail; it takes batches as a `Scorer` does."""

    @abstractmethod
    def update(self, out: Outputs, batch: Batch) -> None:
        """Take one batch: what `Head.measure` gave, on the host, and the batch with its targets."""

    @abstractmethod
    def compute(self) -> dict[str, Any]:
        """Ready for JSON: `rows`, name → columns of a table (`what` says what a row is), and what else there is, such
        as a confusion matrix."""


class Objective(ABC):
    """A target's meaning. `config`: its options; `answers`: what the task says of the targets."""

    name: ClassVar[str]
    config_class: ClassVar[type[ObjectiveConfig]]
    description: ClassVar[str]
    targets: ClassVar[tuple[str, ...]]  # types of target it learns: class, number, …
    wants: ClassVar[Want] = Want()
    figures: ClassVar[tuple[str, ...]] = ()  # its own, where the task does not name them
    continues_text: ClassVar[bool] = False  # targets are tokens of the text itself
    unlabelled: ClassVar[bool] = False  # what is learned lies in the inputs: rows need no target of their own
    slots: ClassVar[bool] = False  # its head reads features of several slots (see `Batch.spread`)
    usual_lr: ClassVar[float | None] = None  # the largest learning rate that training starts from where none is given
    counts: ClassVar[str] = "samples"  # what its head's loss is a mean over, see `Head.weight`
    coupled: ClassVar[bool] = False  # a batch's samples stand in one loss: no accumulation; one rank, or it `gathers`
    gathers: ClassVar[bool] = False  # of such: its head puts the batches of all ranks into one loss
    files: ClassVar[bool] = False  # entries hold more than JSON does, and `save` writes it
    writes: ClassVar[tuple[str, ...]] = ()  # the files of `save`, {} being the name it is given
    counted: ClassVar[bool] = False  # `plan` counts and times its own head, on `made_up` targets, not a classifier's

    def __init__(self, config: Any, answers: Answers) -> None:
        self.config, self.answers = config, answers
        if unknown := [name for name in config.metric if name not in self.metric_names]:
            fitting = ", ".join(self.metric_names) or "what it always reports, and nothing else"
            hint = near(unknown[0], self.metric_names)
            raise UserError(f"--metric {unknown[0]}: objective {self.name} is scored by {fitting}{hint}")

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What `--metric` takes for such answers: the objective's own figures, or more."""
        return self.figures

    @property
    def usual(self) -> tuple[str, ...]:
        """The figures where none are asked for: the objective's own, else the task's."""
        return self.figures or self.answers.metrics

    @property
    def metrics(self) -> tuple[str, ...]:
        """The figures asked for, else the usual ones."""
        return tuple(dict.fromkeys(self.config.metric)) or self.usual

    @abstractmethod
    def encode(self, target: Any, meta: Mapping[str, Any]) -> dict[str, Any]:
        """A raw target and what extraction knows of its sample → scalars or arrays. One sample, on the host."""

    def collate(self, items: Sequence[Mapping[str, Any]], batch: Batch) -> dict[str, Tensor]:
        """Encoded targets of a batch's samples, in order. Scalars are stacked to (B,); arrays go back to back, with
        `NAME.n` (B,) entries each."""
        out: dict[str, Tensor] = {}
        for name in items[0] if items else ():
            arrays = [np.asarray(item[name]) for item in items]
            if arrays[0].ndim == 0:
                out[name] = torch.from_numpy(np.stack(arrays))
            else:
                out[name] = torch.from_numpy(np.concatenate(arrays))
                out[f"{name}.n"] = torch.tensor([len(a) for a in arrays])
        return out

    def made_up(self, batch: Batch) -> dict[str, Tensor]:
        """Targets of a batch that `Backbone.made_up` made, to count and to time a step on; on the meta device too. May
        fill in metas."""
        return {"label": torch.zeros(len(batch), dtype=torch.long, device=batch.device)}

    @abstractmethod
    def head(self, features: Mapping[str, Feature], vocabulary: Vocabulary) -> Head:
        """A head for what a tuner hands out. `vocabulary`: the backbone's frozen language-model head, if it has one."""

    @abstractmethod
    def scorer(self) -> Scorer:
        """A scorer that has seen nothing yet."""

    def report(self) -> Report | None:
        """A report that has seen nothing yet; None where there is no more to say than the figures."""
        return None

    @abstractmethod
    def entries(self, out: Outputs) -> list[dict[str, Any]]:
        """What `Head.predict` gave for B samples, on the host → B entries ready for JSON; with `files`, as `save` takes
        them."""

    def joined(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What is told of a row that is several samples, from what is told of each."""
        raise NotImplementedError

    def save(self, entry: Mapping[str, Any], image: Path, folder: Path, name: str) -> dict[str, Any]:
        """Write what `entry` says of `image` to files called `name` below `folder`. Returns it ready for JSON, with the
        files' names."""
        raise NotImplementedError

    def save_all(self, entries: Sequence[Mapping[str, Any]], images: Sequence[str], folder: Path) -> None:
        """Write what stands in one file for all `images`: `entries` are what `save` returned of each. Nothing, where
        there is none."""
        return None


_OBJECTIVES: dict[str, type[Objective]] = {}


def register_objective(name: str, config_class: type[ObjectiveConfig]) -> Callable[[type[Objective]], type[Objective]]:
    """Class decorator: make an objective known by `name`. Raises ValueError for a taken name."""

    def inner(cls: type[Objective]) -> type[Objective]:
        if name in _OBJECTIVES:
            raise ValueError(f"objective {name!r} is already registered by {_OBJECTIVES[name].__name__}")
        cls.name, cls.config_class = name, config_class
        _OBJECTIVES[name] = cls
        return cls

    return inner


def objective_names() -> list[str]:
    """Registered names, in order of registration."""
    return list(_OBJECTIVES)


def objective_class(name: str) -> type[Objective]:
    """The objective called `name`, of an installed plug-in too; UserError listing those there are otherwise."""
    if name not in _OBJECTIVES:
        load_installed()
    if name not in _OBJECTIVES:
        hint = near(name, _OBJECTIVES)
        raise UserError(f"unknown objective {name!r}{hint}; objectives: {', '.join(_OBJECTIVES)}")
    return _OBJECTIVES[name]


def objective_config(name: str, options: Mapping[str, Any]) -> ObjectiveConfig:
    """An objective's config from plain options; UserError naming one that it does not have or refuses."""
    cls = objective_class(name).config_class
    known = [f.name for f in fields(cls)]
    for option in options:
        if option not in known:
            raise UserError(f"objective {name!r} has no option {option!r}; it has: {', '.join(known) or 'none'}")
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"objective {name!r}: {error}") from None
