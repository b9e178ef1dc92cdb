"""Floating-point operations of the frozen backbone and of a training step, counted by torch's own flop counter.

Everything runs on the meta device: shapes only, no weights, no time. A T5-11B is counted on a laptop in a second.
Counted are matrix products and attention, a multiplication and an addition being two operations; what a training step
does besides (norms, dropout, the optimizer) moves memory rather than computes, and is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.tail import TextTail
from pipeline.extract.batch import Batch, stream_of
from pipeline.lookup.objective import class_objective
from pipeline.train.model import Model, tail_for
from pipeline.train.objectives.base import Objective, Vocabulary
from pipeline.train.objectives.linear_entropy import summed_entropy
from pipeline.train.tuners import TunerConfig, tuner_class


@dataclass(frozen=True)
class Operations:
    """Operations of one batch. `backbone`: the frozen forward pass up to the last state that is wanted; `step`: the
    tuner's forward and backward pass with the live tail. `live`: both."""

    backbone: float
    step: float

    @property
    def live(self) -> float:
        return self.backbone + self.step

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.backbone + other.backbone, self.step + other.step)

    @property
    def ratio(self) -> float:
        """Live over cached: what caching would gain if only operations cost time."""
        return self.live / self.step


class NoValues(TorchDispatchMode):
    """Answers 0 where a model looks at a value, which meta tensors do not have (transformers asks whether a mask may be
    left out)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        return func(*args, **(kwargs or {}))


def fresh_backbone(backbone: Backbone, attention: str) -> Any:
    """The backbone with weights drawn anew, on the present default device."""
    return backbone.make(attention).eval()


def backbone_model(backbone: Backbone, attention: str = "eager") -> nn.Module:
    """The backbone's module on the meta device: shapes without weights."""
    with torch.device("meta"):
        return fresh_backbone(backbone, attention)


Learned = int | Objective  # what costs are counted for: so many classes of samples (0: tokens), or an objective itself


def learned_objective(backbone: Backbone, name: str, learned: Learned, first: int = 0) -> Objective:
    """The objective that costs are counted and timed with; of classes one that calls them by ids from `first` on."""
    if isinstance(learned, Objective):
        return learned
    return class_objective(backbone, tuner_class(name, backbone), [(first + i, 1) for i in range(learned)])


def tuner_model(backbone: Backbone, name: str, config: TunerConfig, classes: Learned = 2) -> Model:
    """A tuner with its tail and head on the meta device."""
    objective = learned_objective(backbone, name, classes)
    with torch.device("meta"):
        return Model.build(
            name, config, backbone, tail_for(name, config, backbone, backbone.attentions[0]), objective
        ).train()


def meta_batch(
    backbone: Backbone, lengths: dict[str, np.ndarray], states: list[str], dtype: torch.dtype = torch.float32
) -> Batch:
    """A batch of the given lengths (stream → (B,)) with `states` in `dtype`, on the meta device."""
    batch = backbone.made_up(lengths, "meta")
    for name in states:
        rows = int(lengths[stream_of(name)].sum())
        batch.states[name] = torch.zeros(rows, backbone.state_width(name), dtype=dtype, device="meta")
    return batch


def backbone_operations(
    backbone: Backbone, lengths: dict[str, np.ndarray], states: list[str], model: nn.Module | None = None
) -> float:
    """Operations of the frozen forward pass over one batch, up to the last of `states`. `model`: a `backbone_model`
    made before."""
    model = backbone_model(backbone) if model is None else model
    with FlopCounterMode(display=False) as counter, NoValues(), torch.no_grad():
        backbone.run(model, meta_batch(backbone, lengths, []), states)
    return float(counter.get_total_flops())


def saved_bytes(
    backbone: Backbone,
    name: str,
    config: TunerConfig,
    lengths: dict[str, np.ndarray],
    classes: Learned,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Bytes that a step keeps for its backward pass, each tensor once; weights and the batch's own states, which are
    in `dtype`, left out."""
    batch = meta_batch(backbone, lengths, tuner_class(name, backbone).states(config, backbone), dtype)
    model = tuner_model(backbone, name, config, classes)
    given = (*model.parameters(), *model.tuner.tail.parameters(), *batch.states.values())
    with NoValues():
        return kept_bytes(given, lambda: surrogate_loss(model, batch))


def kept_bytes(given: Iterable[torch.Tensor], forward: Callable[[], Any]) -> int:
    """Bytes that `forward` keeps for its backward pass, each storage once; those of `given` left out."""
    known = {t.untyped_storage()._cdata for t in given}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in known:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def counts(
    backbone: Backbone, name: str, config: TunerConfig, batches: Iterable[dict[str, np.ndarray]], classes: Learned = 2
) -> list[Operations]:
    """Operations of batches of samples of given lengths (stream → (B,) int64 each) with tuner `name`."""
    model, states = tuner_model(backbone, name, config, classes), tuner_class(name, backbone).states(config, backbone)
    frozen = backbone_model(backbone)
    return [
        Operations(
            backbone_operations(backbone, lengths, states, frozen), step_operations(backbone, lengths, states, model)
        )
        for lengths in batches
    ]


def step_operations(backbone: Backbone, lengths: dict[str, np.ndarray], states: list[str], model: Model) -> float:
    """Operations of a training step of a `tuner_model`, forward and backward, on one batch."""
    batch = meta_batch(backbone, lengths, states)
    with FlopCounterMode(display=False) as step, NoValues():
        surrogate_loss(model, batch).backward()
    return float(step.get_total_flops())


def weighted(batches: Iterable[tuple[float, Operations]]) -> Operations:
    """The mean of several batches, each with its share."""
    found = list(batches)
    return Operations(sum(share * o.backbone for share, o in found), sum(share * o.step for share, o in found))


def surrogate_loss(model: Model, batch: Batch) -> torch.Tensor:
    """The model's loss with every row a target row: the same products as the real one, without looking at values."""
    batch.targets = model.objective.made_up(batch)
    features = model(batch)
    if not model.objective.wants.text_head:
        first, *others = model.head.outlined(features, batch).values()
        return torch.stack([first, *others]).sum() if others else first
    (rows,) = features.values()
    assert isinstance(model.tuner.tail, TextTail)
    if model.objective.continues_text:
        return head_loss(rows, model.tuner.tail)
    tokens = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    return F.cross_entropy(model.tuner.tail.logits(rows).float(), tokens)


def head_loss(rows: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """The loss of a frozen language-model head on `rows` (n, width), each of which predicts a target."""
    tokens = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    entries = int(vocabulary.logits(rows[:0]).shape[1])
    return summed_entropy(rows, tokens, vocabulary.logits, entries, True) / len(rows)


def head_operations(backbone: Backbone, rows: int) -> float:
    """Operations of a frozen language-model head on `rows` positions, forward and back to them."""
    with torch.device("meta"):
        tail = backbone.tail(None, backbone.attentions[0])
        given = torch.zeros(rows, backbone.width, requires_grad=True)
    assert isinstance(tail, TextTail)
    with FlopCounterMode(display=False) as counter:
        head_loss(given, tail).backward()
    return float(counter.get_total_flops())
