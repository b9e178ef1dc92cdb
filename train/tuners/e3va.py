"""E³VA (Yin et al., 2023): a gradient highway beside a frozen Swin; nothing of the backbone is live.

    e ← e + A₁(f₁) + A₂(f₂)        at each block; f₁, f₂: what attention and MLP add to the backbone's stream
    e ← PatchMerging(e)            between stages, the backbone's own, frozen
    A(x) = x + U GELU(D x + b) + c, D and U sums of two low-rank products (rank α = 8, 16 or 32: E³VA, +, ++)

Because A holds x itself, e follows the backbone's stream plus corrections; with e₀ = the patch embedding and no
corrections it is that stream. There is no public code. What the paper leaves open is decided so (methods §4.1):

- e₀: the patch embedding by default, zero as the alternative (`start`).
- How highway and backbone meet before the neck: norm(l + e) by default, norm(e) as the alternative (`fusion`).
- Initialisation: the author's LoRand code draws every factor (Kaiming uniform). Here the last factor starts at zero by
  default, so that training starts from the pretrained network; `zero_init` false gives the author's. A deviation.
- Where a projection keeps branches in fewer channels, adapters read those, and what the branches themselves add up to
  is taken from the states before and after a stage, which stay full: without corrections nothing changes.
- The stacked form of its Table 5 is e + A₂(A₁(f₁) + f₂) here, which is the backbone's stream without corrections too.
- The paper's tasks are dense, with a neck over all stages. A head for one class a sample reads the mean of every
  stage's norm, joined; all norms take part, and the counts are the paper's.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.capabilities import Branches
from pipeline.extract.backbones.swin import SwinTail
from pipeline.extract.batch import Batch
from pipeline.store.errors import UserError
from pipeline.train.configs import E3vaConfig
from pipeline.train.features import Features, Want
from pipeline.train.tuners.base import StateLinear, Tuner, register_tuner, rows_of, state_linear


class LowRank(nn.Module):
    """x ↦ Σₖ x (Tₖ Sₖ) + b, k = 1, 2. Parameters: 2 α (inputs + outputs) + outputs."""

    def __init__(self, inputs: int, outputs: int, alpha: int, zero: bool = False) -> None:
        super().__init__()
        # The two products side by side are one of rank 2 α: the sum is over both.
        self.first = nn.Parameter(torch.empty(2 * alpha, inputs))
        self.second = nn.Parameter(torch.empty(outputs, 2 * alpha))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-1, 1) / math.sqrt(inputs))
        nn.init.kaiming_uniform_(self.first, a=math.sqrt(5))
        for half in self.second.data.chunk(2, dim=1):
            half.copy_(nn.init.kaiming_uniform_(torch.empty_like(half), a=math.sqrt(5)))
        if zero:
            nn.init.zeros_(self.second)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(state_linear(x, self.first), self.second, self.bias)


class Adapter(nn.Module):
    """A(x) = x + U GELU(D x + b) + c. `reads`: channels of x where a projection kept fewer, which `correction` alone
    can take."""

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down, self.up = down, up

    def forward(self, x: Tensor) -> Tensor:
        # The sum in full width: autocast would round the correction to the steps of a tap in half precision.
        return x.float() + self.correction(x)

    def correction(self, x: Tensor) -> Tensor:
        """A(x) − x."""
        out: Tensor = self.up(F.gelu(self.down(x)))
        return out


class LowRankAdapter(Adapter):
    """Through half the width. Parameters: 6 α C + 3 C / 2."""

    def __init__(self, width: int, alpha: int, zero: bool, reads: int) -> None:
        super().__init__(LowRank(reads, width // 2, alpha), LowRank(width // 2, width, alpha, zero))


class PlainAdapter(Adapter):
    """Through `middle` channels, by whole matrices. Parameters: 2 C · middle + middle + C."""

    def __init__(self, width: int, middle: int, zero: bool, reads: int) -> None:
        down, up = StateLinear(reads, middle), nn.Linear(middle, width)
        if zero:
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
        super().__init__(down, up)


@register_tuner("e3va", E3vaConfig)
class E3va(Tuner):
    """Parameters: 12 α Σ C + 3 Σ C over blocks of width C, and 2 C for each stage's norm; with plain adapters
    2 Σ (2 C m + m + C) instead; with mergings that are trained 8 C² + 8 C more for each."""

    description = "E³VA: low-rank adapters on a highway beside a Swin; alpha 8, 16, 32 for E³VA, +, ++"
    shapes = ("pyramid",)
    needs = (Branches,)
    projects = True
    widens = True
    tail: SwinTail

    def __init__(self, config: E3vaConfig, backbone: Backbone, tail: SwinTail, wants: Want) -> None:
        super().__init__(config, backbone, tail, wants)
        self.states(config, backbone)
        self.adapters = nn.ModuleDict()
        for stream in backbone.streams:
            for i in range(backbone.depth(stream)):
                for branch in ("msa", "mlp"):
                    reads = backbone.state_width(f"{stream}.{i}.{branch}")
                    self.adapters[f"{stream}_{i}_{branch}"] = _adapter(config, backbone.width_of(stream), reads)
        self.merges = copy.deepcopy(tail.merges).requires_grad_(True) if config.merging == "trained" else None
        self.norms = nn.ModuleDict({s: nn.LayerNorm(backbone.width_of(s)) for s in backbone.streams})
        self.norms.requires_grad_(config.norms == "trained")
        self.features = {s: rows_of(backbone, s) for s in backbone.streams}

    @classmethod
    def states(cls, config: E3vaConfig, backbone: Backbone) -> list[str]:
        if config.layers:
            raise UserError("layers: E³VA has adapters at every block; there is nothing to choose")
        names = ["stage1.in"] if config.start == "embedding" else []
        for stream in backbone.streams:
            for i in range(backbone.depth(stream)):
                names += [f"{stream}.{i}.msa", f"{stream}.{i}.mlp"]
            if config.fusion == "sum":
                names.append(f"{stream}.{backbone.depth(stream) - 1}")
        return names

    @classmethod
    def refuse(cls, config: E3vaConfig, backbone: Backbone) -> str | None:
        usual = config.start == "embedding" and config.fusion == "sum" and config.order == "parallel"
        if backbone.projection is None or usual:
            return None
        return "E³VA reads projected branches with --start embedding, --fusion sum and --order parallel only"

    def forward(self, batch: Batch) -> Features:
        """A map a stage."""
        start = batch.states["stage1.0.msa"].float()
        e = self._map("stage1.in", batch) if self.config.start == "embedding" else torch.zeros_like(start)
        out: Features = {}
        for number, stream in enumerate(self.backbone.streams):
            if number:
                e = self.tail.merge(e, number - 1, batch, self.merges)
            for i in range(self.backbone.depth(stream)):
                e = self._block(e, f"{stream}.{i}", batch)
            if self.backbone.projection is not None:
                e = e + self._way(number, batch)
            last = f"{stream}.{self.backbone.depth(stream) - 1}"
            met = e + self._map(last, batch) if self.config.fusion == "sum" else e
            out[stream] = self.norms[stream](met)
        return out

    def _block(self, e: Tensor, block: str, batch: Batch) -> Tensor:
        """The highway past a block of the backbone."""
        attention, mlp = (batch.states[f"{block}.{branch}"] for branch in ("msa", "mlp"))
        adapters: list[Any] = [self.adapters[f"{block.replace('.', '_')}_{branch}"] for branch in ("msa", "mlp")]
        first, second = adapters
        if self.backbone.projection is not None:
            return e + first.correction(attention) + second.correction(mlp)
        if self.config.order == "stacked":
            return e + second(first(attention) + mlp.float())
        return e + first(attention) + second(mlp)

    def _way(self, number: int, batch: Batch) -> Tensor:
        """What all branches of a stage add up to, from the states around it: of projected branches the sum is not
        known."""
        streams = self.backbone.streams
        states = [self._map(f"{s}.{self.backbone.depth(s) - 1}", batch) for s in streams[: number + 1]]
        start = self.tail.merge(states[-2], number - 1, batch) if number else self._map("stage1.in", batch)
        return states[-1] - start

    def _map(self, state: str, batch: Batch) -> Tensor:
        return self.backbone.widened(state, batch.states[state])


def _adapter(config: E3vaConfig, width: int, reads: int) -> nn.Module:
    if config.adapter == "plain":
        return PlainAdapter(width, config.middle or 32, config.zero_init, reads)
    return LowRankAdapter(width, config.alpha, config.zero_init, reads)
