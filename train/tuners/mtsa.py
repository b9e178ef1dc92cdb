"""Multi-tiered sensing adapter (MTSA), the core of SHERL §3.2, in the form of the released T5 and CLIP-ViL code.

Token-wise: it works on packed rows and never sees padding. Everything is computed in float32, whatever the
surrounding precision, because the paper's epsilon of 1e-6 vanishes in float16.

Where the released code and the paper differ the code is followed: the score is a learned weighted inner product, all
maps have biases, and ReLU precedes the up-projection. Two guards are ours: a squared norm counts as 1e-6 at least, so
that the gradient at an all-zero row is finite, and redundancy is at least 1 (the paper states r ≥ 1; the code gives
0/0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.extract.stackable import Stackable
from pipeline.store.errors import UserError
from pipeline.train.tuners.base import full_precision, linear

EPSILON = 1e-6  # added to norms in the released T5, CLIP-ViL and CLIP4Clip code; 1e-8 in that for CNNs
SMALLEST = 1e-6  # a squared norm
CHUNK_ROWS = 1024  # rows recomputed at a time


def redundancy(features: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Summed rectified cosine similarity of each layer's feature to all of them, SHERL eq. 2.

    `features`: (rows, layers, width) float32. Returns (rows, layers), each ≥ 1. A zero row counts as redundancy 1.
    """
    # Scaling the products, not the features, keeps nothing of the features' size for the backward pass.
    products = _Gram.run(features)
    scale = (products.diagonal(dim1=1, dim2=2).clamp(min=SMALLEST).sqrt() + epsilon).reciprocal()
    return (products * scale.unsqueeze(1) * scale.unsqueeze(2)).relu_().sum(-1).clamp(min=1.0)


class _Gram(Stackable):
    """X Xᵀ of each matrix, with one product in the backward pass: (G + Gᵀ) X."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.bmm(x, x.transpose(1, 2))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.bmm(grad + grad.transpose(1, 2), x)


def layer_weights(scores: Tensor, redundant: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Rectified scores over redundancy, l1-normalised over layers (SHERL eq. 3). `scores`: (rows, layers); `redundant`:
    the same, or (layers,) where it is learned, which may become negative."""
    weights = F.relu(scores) / redundant
    return weights / (weights.abs().sum(-1, keepdim=True) + epsilon)


# How the layers are blended; the first is SHERL's. Its ablations (Fig. 4) are max and average pooling, multi-head
# self-attention, the learned attention without redundancy, and with a learned one. "attention", softmax attention from
# the guide, is ours.
SCORED = ("redundancy", "linear", "linear-learned")  # those with the learned product w, c
HEADS = 4  # of mhsa, from the paper


def learned(how: str, layers: int, inner: int) -> nn.Module | nn.Parameter | None:
    """What else a blend of `layers` features of width `inner` learns: mhsa its attention, linear-learned a redundancy a
    layer, from 1. Raises UserError where the heads of mhsa do not divide the width."""
    if how == "linear-learned":
        return nn.Parameter(torch.ones(layers))
    if how != "mhsa":
        return None
    if inner % HEADS:
        raise UserError(f"blend: the {HEADS} heads of mhsa do not divide the side width {inner}; change --reduction")
    return nn.MultiheadAttention(inner, HEADS, batch_first=True)


def mix(
    layers: Tensor, guide: Tensor, score: nn.Linear | None, how: str, own: Any = None, epsilon: float = EPSILON
) -> Tensor:
    """Blend `layers` (rows, layers, d) into (rows, d), the guide (rows, d) added. `score`: the learned product w, c;
    `own`: what `learned` gave; `epsilon`: what is added to norms. The paper does not say how the rows of mhsa become
    one; here they are averaged."""
    if how == "max":
        return layers.amax(1) + guide
    if how == "average":
        return layers.mean(1) + guide
    if how == "mhsa":
        return own(layers, layers, layers, need_weights=False)[0].mean(1) + guide
    weights = attention(layers, guide, score, how, own, epsilon)
    return torch.bmm(weights.unsqueeze(1), layers).squeeze(1) + guide


def attention(layers: Tensor, guide: Tensor, score: nn.Linear | None, how: str, own: Any, epsilon: float) -> Tensor:
    """(rows, layers), the weight of each layer in a blend that weighs them; arguments as of `mix`."""
    if score is None:
        return (torch.bmm(layers, guide.unsqueeze(-1)).squeeze(-1) / layers.shape[-1] ** 0.5).softmax(-1)
    # The learned score w·(E ∘ e) + c is one product of E with w ∘ e.
    query = guide * score.weight[0]
    scores = torch.bmm(layers, query.unsqueeze(-1)).squeeze(-1) + score.bias
    if how == "redundancy":
        redundant = redundancy(layers, epsilon)
    else:
        redundant = own if how == "linear-learned" else torch.ones_like(scores)
    return layer_weights(scores, redundant, epsilon)


class MTSA(nn.Module):
    """n sets of features (rows, `widths[i]`), the last one the guide → (rows, width of the guide). `blend`: one of
    `train.configs.BLENDS`.

    Parameters per set: width·d + d and 2(d² + d); in all d + 1 for the score, d·width + width for the way up and 1 for
    the gate (methods §1.6 without the norm that follows). Blends other than the three `SCORED` have no score;
    "linear-learned" has n − 1 more, "mhsa" 4(d² + d).
    """

    def __init__(
        self,
        widths: Sequence[int],
        inner: int,
        gate: float = 0.0,
        temperature: float = 0.1,
        blend: str = "redundancy",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        sets, width = len(widths), widths[-1]
        if sets < 2:
            raise ValueError(f"MTSA needs a guide and at least one more set of features, not {sets}")
        self.temperature, self.blend, self.recompute = temperature, blend, recompute
        self.down = nn.ModuleList(linear(n, inner) for n in widths)
        # The two d × d maps of each set, W' (mix) and W (gate), side by side: one batched product serves all sets.
        self.mix_weight = nn.Parameter(torch.empty(sets, inner, 2 * inner).normal_(std=0.01))
        self.mix_bias = nn.Parameter(torch.zeros(sets, 1, 2 * inner))
        self.score = linear(inner, 1) if blend in SCORED else None
        self.learned = learned(blend, sets - 1, inner)
        self.up = linear(inner, width)
        self.gate = nn.Parameter(torch.full((), float(gate)))

    def ratio(self) -> Tensor:
        """The mixing ratio u = tanh(alpha / T), 0 at the paper's start."""
        return torch.tanh(self.gate / self.temperature)

    def forward(self, features: Sequence[Tensor], last: Tensor) -> Tensor:
        """`features`: n tensors (rows, width), the guide last; `last`: the feature the gate lets through.

        With `recompute`, what lies between is not kept for the backward pass but computed again, some rows at a time.
        """
        if not (self.recompute and torch.is_grad_enabled()) or len(last) <= CHUNK_ROWS:
            return self._blend(last, *features)
        parts = zip(*(x.split(CHUNK_ROWS) for x in (last, *features)), strict=True)
        return torch.cat([checkpoint(self._blend, *p, use_reentrant=False, preserve_rng_state=False) for p in parts])

    def _blend(self, last: Tensor, *features: Tensor) -> Tensor:
        with full_precision(last.device):
            layers, guide = self._refined(features)
            blended = mix(layers, guide, self.score, self.blend, own=self.learned)
            # As a vector the ratio widens a `last` in half precision, which a scalar would not.
            return self.up(F.relu(blended)) + self.ratio().view(1) * last

    def _refined(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The features at side width: (rows, n − 1, d), and the guide (rows, d)."""
        # Rectified in place after stacking: one copy of the narrow features is kept for the backward pass, not two.
        low = torch.stack([d(h) for d, h in zip(self.down, features, strict=True)]).relu_()
        mixed, gated = torch.baddbmm(self.mix_bias, low, self.mix_weight).chunk(2, dim=-1)
        refined = (mixed + low) * torch.sigmoid(gated)
        return refined[:-1].transpose(0, 1), refined[-1]

    def shown(self, features: Sequence[Tensor]) -> tuple[Tensor | None, Tensor]:
        """The weight of each layer (rows, n − 1), None for a blend that has none; and the rectified cosine of each with
        each (rows, n − 1, n − 1), which sums to the redundancy (SHERL eq. 2)."""
        with full_precision(features[0].device):
            layers, guide = self._refined(features)
            weighs = self.blend in (*SCORED, "attention")
            weights = attention(layers, guide, self.score, self.blend, self.learned, EPSILON) if weighs else None
            unit = layers / layers.square().sum(-1, keepdim=True).clamp(min=SMALLEST).sqrt()
            return weights, torch.bmm(unit, unit.transpose(1, 2)).relu()
