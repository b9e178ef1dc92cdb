"""Dropout and attention for the trained part on a CPU, where torch's own dropout costs more than the products near it.

A Bernoulli mask takes 5.7 ns a value there; 16 random bits a value, compared with a threshold, take 0.8 ns. Both draw
from torch's generator. On any other device, and in eval mode, torch's own kernels run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from pipeline.extract.kernels import enabled
from pipeline.extract.stackable import Stackable

_LEVELS = 1 << 16
SIDE = "side"  # the name of `side_attention` in a transformers configuration


def kept(
    shape: torch.Size, p: float, device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> tuple[Tensor, float]:
    """(int8 mask, 0 with probability p and else 1; 1 / the probability of 1). p counts in steps of 1 / 65,536; the
    factor belongs to the step that is used. `generator`: what is drawn from, torch's own if not given."""
    cut, count = round(p * _LEVELS), shape.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    bits.random_(-(1 << 63), None, generator=generator)
    # One byte a value, and unlike bool torch compares into it and converts from it with vector instructions.
    mask = torch.empty(shape, dtype=torch.int8, device=device)
    torch.ge(bits.view(torch.int16)[:count].view(shape), cut - _LEVELS // 2, out=mask)
    return mask, _LEVELS / max(1, _LEVELS - cut)


def masked(x: Tensor, mask: Tensor, factor: float) -> Tensor:
    """`x` where `kept`'s mask is 1, times its factor."""
    return mask.to(x.dtype).mul_(x).mul_(factor)


class _Drop(Stackable):
    """Keeps the mask alone for the backward pass, a byte a value."""

    @staticmethod
    def forward(x: Tensor, mask: Tensor, factor: float) -> Tensor:
        return masked(x, mask, factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[2]
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, mask: Tensor, factor: float) -> tuple[Tensor, int]:
        x = x if in_dims[0] is None else x.movedim(in_dims[0], 0)
        return _Drop.run(x.expand(mask.shape), mask, factor), 0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return masked(grad, mask, ctx.factor), None, None


# Where several runs are computed as one (`torch.func.vmap`): the generator of each, and its number, whose value is
# another for each of them.
_RUNS: ContextVar[tuple[Sequence[torch.Generator], Tensor] | None] = ContextVar("generators of runs", default=None)


@contextmanager
def drawing(generators: Sequence[torch.Generator], number: Tensor) -> Iterator[None]:
    """Within it dropout draws for each of several runs from its own generator, in the order in which it would alone.
    `number`: that of the run, a scalar that `vmap` maps over."""
    token = _RUNS.set((generators, number))
    try:
        yield
    finally:
        _RUNS.reset(token)


class _Masks(torch.autograd.Function):
    """A mask of `shape` for each run."""

    @staticmethod
    def forward(number: Tensor, shape: torch.Size, p: float, generators: Sequence[torch.Generator]) -> Tensor:
        raise RuntimeError("masks of several runs are drawn where these are computed as one")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, number: Tensor, shape: torch.Size, p: float, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, int]:
        return torch.stack([kept(torch.Size(shape), p, number.device, own)[0] for own in generators]), 0


def drop(x: Tensor, p: float, training: bool) -> Tensor:
    """`x` with each value zero with probability `p` and the others scaled by 1 / (1 − p), while training."""
    torchs = not enabled() or x.device.type not in ("cpu", "meta")
    if not training or torchs or not 0 < round(p * _LEVELS) < _LEVELS:
        return F.dropout(x, p, training)
    if (runs := _RUNS.get()) is not None:
        mask, factor = _Masks.apply(runs[1], x.shape, p, runs[0]), _LEVELS / (_LEVELS - round(p * _LEVELS))
        return _Drop.run(x, mask, factor)
    mask, factor = kept(x.shape, p, x.device)
    return _Drop.run(x, mask, factor)


class Dropout(nn.Dropout):
    """`nn.Dropout` with the mask of `drop`."""

    def forward(self, input: Tensor) -> Tensor:
        return drop(input, self.p, self.training)


def use_fast_dropout(module: nn.Module) -> nn.Module:
    """Every `nn.Dropout` within `module` becomes a `Dropout`."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Dropout:
            setattr(module, name, Dropout(child.p))
        else:
            use_fast_dropout(child)
    return module


def side_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in plain products: (B, H, P, d) queries over (B, H, L, d) → (B, P, H, d).

    `attention_mask` is bool (true: seen) or additive, broadcast to (B, H, P, L). With attention dropout torch's fused
    kernel falls back to a path of twice as many passes over the (B, H, P, L) weights.
    """
    scores = torch.matmul(query * (query.shape[-1] ** -0.5 if scaling is None else scaling), key.transpose(2, 3))
    for term in (position_bias, attention_mask):
        if term is not None and term.dtype == torch.bool:
            scores.masked_fill_(~term, torch.finfo(scores.dtype).min)
        elif term is not None:
            scores += term
    weights = drop(scores.softmax(-1), dropout, module.training)
    return torch.matmul(weights, value).transpose(1, 2), None


AttentionInterface.register(SIDE, side_attention)
