"""Live counterparts: methods that train inside the backbone, for tables beside the tuners. Nothing of them is cached.

Each is one function that makes some of a loaded backbone trainable; a pooled head reads the last state. They run on
encoders (text and images); a text-to-text backbone has none here yet.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from extract.backbones.base import Family
from extract.backbones.batch import Batch
from extract.backbones.live import Backbone
from store.errors import UserError
from train.heads.pooled import PooledHead
from train.live import LiveSource
from train.model import Target

_NORMS = (nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm)
_ATTENTION = ("query", "value", "qkv", "q_proj", "v_proj", "q", "v")  # what LoRA is put on, by module name


@dataclass(frozen=True)
class Counterpart:
    """`prepare(family, model)` makes parts of the model trainable or adds to it. `lr`: the rate used by default."""

    name: str
    description: str
    lr: float
    prepare: Callable[[Family, nn.Module], None]


def _full(family: Family, model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("pooler" not in name)


def _bitfit(family: Family, model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias") and "pooler" not in name)


def _norms(family: Family, model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _NORMS):
            module.requires_grad_(True)


def _partial(family: Family, model: nn.Module) -> None:
    family.last_block(model).requires_grad_(True)


def _lora(family: Family, model: nn.Module) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("lora needs the peft package: pip install 'activation-pipeline[counterparts]'") from None
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    targets = [n for n in _ATTENTION if n in names]
    if not targets:
        raise UserError(f"lora: {family.name} backbones have no attention to put it on")
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=targets), model)


class Bottleneck(nn.Module):
    """x + up(GELU(down x)), the way up started at zero."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.gelu(self.down(x)))


class Adapted(nn.Module):
    """A block with a bottleneck adapter on its output."""

    def __init__(self, block: nn.Module, width: int) -> None:
        super().__init__()
        self.block, self.adapter = block, Bottleneck(width, max(1, width // 8))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.block(*args, **kwargs)
        return (self.adapter(out[0]), *out[1:]) if isinstance(out, tuple) else self.adapter(out)


def _adapter(family: Family, model: nn.Module) -> None:
    if family.shape != "sequence":
        raise UserError(f"adapter: {family.name} backbones have no token blocks to put it on")
    last = family.last_block(model)
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and last in list(m))
    for i, block in enumerate(blocks):
        blocks[i] = Adapted(block, family.width)


COUNTERPARTS = {
    c.name: c
    for c in (
        Counterpart("full", "full fine-tuning", 5e-5, _full),
        Counterpart("lora", "LoRA of rank 8 on the attention's queries and values (peft)", 1e-3, _lora),
        Counterpart("adapter", "a bottleneck adapter of width D / 8 after each block", 1e-3, _adapter),
        Counterpart("bitfit", "BitFit: the biases", 1e-3, _bitfit),
        Counterpart("norm-tuning", "weights and biases of the norms", 1e-3, _norms),
        Counterpart("partial-1", "the last block", 2e-4, _partial),
    )
}


def counterpart(name: str) -> Counterpart:
    """The counterpart called `name`; UserError offering the nearest otherwise."""
    if name in COUNTERPARTS:
        return COUNTERPARTS[name]
    near = difflib.get_close_matches(name, COUNTERPARTS, n=2, cutoff=0.4) or list(COUNTERPARTS)
    raise UserError(f"unknown counterpart {name!r}; did you mean {' or '.join(near)}?")


class CounterpartModel(nn.Module):
    """A backbone with something trainable in it and a pooled head; what the training loop needs of a model."""

    def __init__(self, method: Counterpart, family: Family, model: nn.Module, target: Target, seed: int = 0) -> None:
        super().__init__()
        if family.readout != "pooled":
            raise UserError(f"{method.name}: live counterparts run on encoders; {family.name} writes text")
        self.family, self.backbone, self.target = family, model, target
        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            method.prepare(family, model)
            self.stream = family.streams[-1 if family.shape == "pyramid" else 0]
            self.head = PooledHead(family.width, target.classes, target.kind, self.stream, target.pooling)

    def train(self, mode: bool = True) -> CounterpartModel:
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):  # small batches would spoil the statistics
                module.train(False)
        return self

    def forward(self, batch: Batch) -> Tensor:
        """(rows, width) of the last state."""
        state = f"{self.stream}.{self.family.depth(self.stream) - 1}"
        rows = self.family.run(self.backbone, batch, [state])[state]
        return self.family.finish(self.backbone, rows)

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss over the batch, a scalar."""
        return self.head.loss(self(batch), batch)

    def predict(self, batch: Batch) -> Tensor:
        """(B,) predicted class indices or values, on the host."""
        return self.head.predict(self(batch), batch).cpu()

    def trainable_parameters(self) -> int:
        """Number of trainable values, the head's included."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def trainable_state(self) -> dict[str, Tensor]:
        """Name → tensor of everything that is trained, on the host."""
        return {k: p.detach().cpu().contiguous() for k, p in self.named_parameters() if p.requires_grad}

    def load_trainable(self, state: dict[str, Tensor]) -> None:
        """Put a saved state back. Raises UserError where it does not fit."""
        own = {k: p for k, p in self.named_parameters() if p.requires_grad}
        if own.keys() != state.keys():
            raise UserError(f"saved weights do not fit this model: {min(own.keys() ^ state.keys())}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])


class InputSource(LiveSource):
    """The batches of a `LiveSource` without any states: the model computes its own."""

    def _batch(self, index: np.ndarray) -> Batch:
        began = time.perf_counter()
        batch = self.inputs.take(index).batch(self.backbone.device)
        batch.index = index
        if self.labels is not None:
            batch.labels = self.labels[torch.from_numpy(index)].to(self.backbone.device)
        batch.wait_seconds = time.perf_counter() - began
        return batch


def input_source(source: LiveSource, backbone: Backbone) -> InputSource:
    """`source` without states."""
    labels = None if source.labels is None else source.labels.numpy()
    return InputSource(backbone, source.inputs, labels, [], source.order)
