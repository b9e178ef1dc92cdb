"""`Model`: a tuner, an objective's head and the frozen tail they share, as the training loop sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.capabilities import LateBlocks
from pipeline.extract.backbones.tail import LiveTail, Tail
from pipeline.extract.batch import Batch
from pipeline.store.errors import UserError, within
from pipeline.train.features import Feature, Features
from pipeline.train.objectives.base import Head, Objective, Outputs, Vocabulary
from pipeline.train.tuners.base import Tuner, TunerConfig, fitting_tuner, tuner_class
from pipeline.train.tuners.towers import Towers


class Reader(nn.Module):
    """Something that gives features, and a head that reads them: what the training loop needs of a model."""

    objective: Objective
    head: Head

    def forward(self, batch: Batch) -> Features:
        """What the head reads."""
        raise NotImplementedError

    def penalty(self) -> Tensor | None:
        """What a training batch adds to the loss beside the head's terms; None for nothing."""
        return None

    def loss(self, batch: Batch) -> Tensor:
        """The sum of the head's losses, a scalar; in training mode with the penalty."""
        first, *others = self.head.losses(self(batch), batch).values()
        penalty = self.penalty() if self.training else None
        return sum(others if penalty is None else [*others, penalty], first)

    def embed(self, slot: str, batch: Batch) -> Tensor:
        """(m, width), the distinct samples of `slot` in the batch, as a head that ranks compares them."""
        return self.head.embed(slot, self(batch), batch)

    def weight(self, batch: Batch) -> float:
        """What the batch's loss counts for beside others."""
        return self.head.weight(batch)

    def predict(self, batch: Batch) -> Outputs:
        """What is told of each sample, on the host."""
        return on_host(self.head.predict(self(batch), batch))

    def measure(self, batch: Batch) -> Outputs:
        """What the scorer reads, on the host."""
        return on_host(self.head.measure(self(batch), batch))

    def begin_step(self, step: int, steps: int, an_epoch: int) -> None:
        """Called before optimizer step `step` of `steps`, `an_epoch` of which make up an epoch."""
        self.head.begin_step(step, steps, an_epoch)

    def stepped(self) -> None:
        """Called after each optimizer step."""

    def trainable_parameters(self) -> int:
        """Number of trainable values, the head's included."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def on_host(out: Outputs) -> Outputs:
    """Outputs with their tensors on the host."""
    return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in out.items()}


class Model(Reader):
    """A tuner and a head. Parameters are the two's; the tail's are frozen, shared and not among them.

    Raises UserError where the tuner's features are not what the objective's head reads.
    """

    def __init__(self, tuner: Tuner, objective: Objective) -> None:
        super().__init__()
        self.tuner, self.objective = tuner, objective
        if isinstance(tuner, Towers):
            if not objective.slots:
                raise UserError(f"objective {objective.name} reads one backbone, not several slots")
            for slot, part in tuner.each().items():
                with within(f"slot {slot}"):
                    refuse_features(part, objective)
        else:
            refuse_features(tuner, objective)
        # A tail without a language-model head is read by no head that would ask for one: refused above.
        self.head = objective.head(tuner.features, cast(Vocabulary, tuner.tail))

    @classmethod
    def build(
        cls,
        name: str,
        config: TunerConfig,
        backbone: Backbone,
        tail: Tail,
        objective: Objective,
        seed: int | None = None,
    ) -> Model:
        """The model of tuner `name`; with `seed`, its weights are drawn from that seed alone."""
        with drawn_from(seed):
            return cls(tuner_class(name, backbone)(config, backbone, tail, objective.wants), objective)

    def forward(self, batch: Batch) -> Features:
        return self.tuner(batch)

    def penalty(self) -> Tensor | None:
        return self.tuner.penalty(self.head)

    def begin_step(self, step: int, steps: int, an_epoch: int) -> None:
        super().begin_step(step, steps, an_epoch)
        self.tuner.begin_step(step, steps)

    def stepped(self) -> None:
        self.tuner.stepped(self.head)

    def to(self, *args: Any, **kwargs: Any) -> Model:
        self.tuner.tail.to(*args, **kwargs)
        return super().to(*args, **kwargs)

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


@contextmanager
def drawn_from(seed: int | None) -> Iterator[None]:
    """Weights that are made within it are drawn from `seed` alone; None leaves all as it is."""
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def refuse_features(tuner: Tuner, objective: Objective) -> None:
    """UserError, one sentence, where `objective` cannot read what `tuner` hands out."""
    wants, backbone = objective.wants, tuner.backbone
    continues = objective.continues_text or backbone.continues_text
    writes = backbone.continues_text if continues else backbone.writes_text
    if wants.text_head and not writes:
        raise UserError(
            f"objective {objective.name} needs a backbone that writes text; {backbone.name} backbones do not"
        )
    if wants.text_head and not (tuner.continues_text if continues else tuner.text_head):
        raise UserError(f"objective {objective.name} needs rows for a text head, which tuner {tuner.name} has none of")
    refuse_kinds(f"tuner {tuner.name} on {backbone.name} backbones", tuner.features, objective)
    for feature in tuner.features.values():
        if backbone.writes_text and not wants.text_head and feature.stream == backbone.streams[-1]:
            # While training, a text decoder is fed the answer.
            raise UserError(
                f"objective {objective.name} cannot read tuner {tuner.name} on {backbone.name} backbones: its rows "
                "have seen the target; use --objective label-text, or a tuner that reads the encoder (probe, unipt)"
            )


def refuse_kinds(what: str, features: Mapping[str, Feature], objective: Objective) -> None:
    """UserError where `objective` can read none of the kinds that `what` hands out."""
    wants = objective.wants.kinds
    for feature in features.values():
        if not set(feature.kinds) & set(wants):
            raise UserError(
                f"objective {objective.name} reads {' or '.join(wants)} features; {what} hands out a {feature.kind}"
            )


def tail_for(
    name: str,
    config: TunerConfig,
    backbone: Backbone,
    attention: str,
    weights: dict[str, Tensor] | None = None,
    late: Mapping[int, dict[str, Tensor]] | None = None,
) -> Tail:
    """The tail that tuner `name` needs, with its late layers; without `weights` its shape only."""
    tail = backbone.tail(weights, attention)
    for i in tuner_class(name, backbone).late_layers(config, backbone):
        assert isinstance(tail, LiveTail) and isinstance(backbone, LateBlocks)
        tail.late[str(i)] = backbone.late_block(None if weights is None else (late or {})[i], attention)
    return tail


def late_weights(name: str, config: TunerConfig, backbone: Backbone, model: Any) -> dict[int, dict[str, Tensor]]:
    """What `tail_for` puts into the late layers that tuner `name` needs, from a loaded backbone."""
    layers = tuner_class(name, backbone).late_layers(config, backbone)
    return {i: backbone.block_weights(model, i) for i in layers} if isinstance(backbone, LateBlocks) else {}


def state_names(name: str, config: TunerConfig, backbone: Backbone) -> list[str]:
    """The states tuner `name` reads on `backbone`."""
    return tuner_class(name, backbone).states(config, backbone)


def union_states(pairs: Sequence[tuple[str, TunerConfig]], backbone: Backbone) -> list[str]:
    """The states that several tuners read between them, in the backbone's order. UserError for one that cannot work on
    it with its options."""
    wanted = {s for name, config in pairs for s in fitting_tuner(name, config, backbone).states(config, backbone)}
    return [s for s in (*backbone.states(), *backbone.made_states()) if s in wanted]
