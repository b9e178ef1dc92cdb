"""`Model`: a tuner, its readout and the frozen tail it shares, as the training loop sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.extract.backbones.base import Family, Tail
from pipeline.extract.backbones.batch import Batch
from pipeline.store.errors import UserError
from pipeline.train.heads.lm import LMHead
from pipeline.train.heads.pooled import PooledHead
from pipeline.train.tuners.base import Tuner, TunerConfig, tuner_class


@dataclass(frozen=True)
class Target:
    """What is predicted. `classes`: number of classes (0 for a regression). `candidates`: token ids of each target
    text, for text-to-text backbones; `values`: the number each stands for, for a regression. `pooling`: "mean" or
    "first", for pooled readouts."""

    kind: Literal["classification", "regression"]
    classes: int = 0
    candidates: tuple[tuple[int, ...], ...] = ()
    values: tuple[float, ...] = ()
    pooling: Literal["mean", "first"] = "mean"


class Model(nn.Module):
    """loss(batch), predict(batch) and the trainable state. Parameters are the tuner's and the head's; the tail's are
    frozen, shared and not among them."""

    def __init__(self, tuner: Tuner, target: Target) -> None:
        super().__init__()
        self.tuner = tuner
        self.target = target
        self.head: LMHead | PooledHead
        if tuner.readout() == "lm":
            if not target.candidates:
                raise UserError("a text-to-text backbone needs target texts; the task gives none")
            self.head = LMHead(tuner.tail, target.candidates, target.values)
        else:
            self.head = PooledHead(tuner.output_width, target.classes, target.kind, tuner.stream, target.pooling)

    @classmethod
    def build(
        cls, name: str, config: TunerConfig, family: Family, tail: Tail, target: Target, seed: int | None = None
    ) -> Model:
        """The model of tuner `name`; with `seed`, its weights are drawn from that seed alone."""
        if seed is None:
            return cls(tuner_class(name, family)(config, family, tail), target)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(tuner_class(name, family)(config, family, tail), target)

    def forward(self, batch: Batch) -> Tensor:
        """(rows, width) of the tuner's last stream, before the readout."""
        return self.tuner(batch)

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss over the batch, a scalar; in training mode with the tuner's penalty."""
        loss = self.head.loss(self.tuner(batch), batch)
        penalty = self.tuner.penalty(self.head) if self.training else None
        return loss if penalty is None else loss + penalty

    def stepped(self) -> None:
        """Called after each optimizer step."""
        self.tuner.stepped(self.head)

    def predict(self, batch: Batch) -> Tensor:
        """(B,) predicted class indices or values, on the host."""
        return self.head.predict(self.tuner(batch), batch).cpu()

    def to(self, *args: Any, **kwargs: Any) -> Model:
        self.tuner.tail.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def trainable_parameters(self) -> int:
        """Number of trainable values: tuner and head."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def trainable_state(self) -> dict[str, Tensor]:
        """Name → tensor of everything that was trained, on the host. Frozen weights (of a live layer that something
        trainable was put into) are not among it."""
        return {k: v.detach().cpu().contiguous() for k, v in self._trained().items()}

    def _trained(self) -> dict[str, Tensor]:
        frozen = {n for n, p in self.named_parameters() if not p.requires_grad}
        return {k: v for k, v in self.state_dict().items() if k not in frozen}

    def load_trainable(self, state: dict[str, Tensor]) -> None:
        """Put a saved state back. Raises UserError naming the first tensor that does not fit."""
        own = self._trained()
        wrong = sorted(own.keys() ^ state.keys()) or [k for k in own if own[k].shape != state[k].shape]
        if wrong:
            raise UserError(f"saved tuner does not fit this model: {wrong[0]} is missing, unknown or of another shape")
        self.load_state_dict(state, strict=False)


def tail_for(
    name: str,
    config: TunerConfig,
    family: Family,
    attention: str,
    weights: dict[str, Tensor] | None = None,
    late: Mapping[int, dict[str, Tensor]] | None = None,
) -> Tail:
    """The tail that tuner `name` needs, with its late layers; without `weights` its shape only."""
    tail = family.tail(weights, attention)
    for i in tuner_class(name, family).late_layers(config, family):
        tail.late[str(i)] = family.late_block(None if weights is None else (late or {})[i], attention)
    return tail


def state_names(name: str, config: TunerConfig, family: Family) -> list[str]:
    """The states tuner `name` reads on `family`."""
    return tuner_class(name, family).states(config, family)


def union_states(pairs: Sequence[tuple[str, TunerConfig]], family: Family) -> list[str]:
    """The states that several tuners read between them, in the family's order."""
    wanted = {s for name, config in pairs for s in state_names(name, config, family)}
    return [s for s in family.states() if s in wanted]
