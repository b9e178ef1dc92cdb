"""SHERL and UniPT on staged backbones (CNNs, Swin): maps of all stages brought to the last one's grid, then position
by position.

A 1 × 1 convolution with batch norm on maps is a linear map with batch norm on packed rows, so images of any size go
together without padding. "Cells" are the fine positions under one position of the last grid; where sizes divide,
pooling over cells is pooling with kernel = stride.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.capabilities import LiveLast
from pipeline.extract.backbones.grids import cell_counts, cells, max_cells, mean_cells, sizes, sum_cells
from pipeline.extract.backbones.tail import LiveTail, Tail
from pipeline.extract.batch import Batch
from pipeline.store.errors import UserError
from pipeline.train.features import Features, Want
from pipeline.train.tuners.base import Tuner, TunerConfig, checked_reduction, form, full_precision, rows_of
from pipeline.train.tuners.mtsa import SCORED, learned, mix
from pipeline.train.tuners.sherl import SherlConfig
from pipeline.train.tuners.unipt import EPSILON, Aggregate, UniptConfig


class ConvNorm(nn.Module):
    """A 1 × 1 convolution and batch norm, on rows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, rows: Tensor) -> Tensor:
        rows = self.linear(rows.float())
        if self.training and len(rows) < 2:  # one position has no variance
            mean, var, eps = self.norm.running_mean, self.norm.running_var, self.norm.eps
            return F.batch_norm(rows, mean, var, self.norm.weight, self.norm.bias, False, 0.0, eps)
        return self.norm(rows)


def taps(config: TunerConfig, backbone: Backbone, method: str, live: bool) -> list[str]:
    """The output of every stage; of the last, where its last block is live, that of the block before.

    Raises UserError for chosen layers: which positions of which stage would be meant is not said by numbers.
    """
    if config.layers:
        raise UserError(f"layers: {method} on {backbone.name} backbones reads every stage; there is nothing to choose")
    names = [f"{s}.{backbone.depth(s) - 1}" for s in backbone.streams]
    if live:
        names[-1] = f"{backbone.streams[-1]}.{backbone.depth(backbone.streams[-1]) - 2}"
    return names


def no_live_block(backbone: Backbone) -> str | None:
    """Why SHERL has no live layer on a staged backbone; None where it has."""
    if backbone.depth(backbone.streams[-1]) > 1:
        return None
    last = f"{backbone.streams[-1]} of {backbone.name} backbones has a single one"
    return f"SHERL's live layer is the last of two blocks or more of one width; {last}"


def cells_of(backbone: Backbone, batch: Batch) -> dict[str, Tensor | None]:
    """For each stream, the row of the last stage's map above each of its rows; None for the last stage itself."""
    last = sizes(batch, backbone.streams, backbone.streams[-1])
    out: dict[str, Tensor | None] = {}
    for stream in backbone.streams:
        shape = sizes(batch, backbone.streams, stream)
        out[stream] = None if (shape == last).all() else cells(shape, last, batch.device)
    return out


@form("sherl", "pyramid")
class SherlConv(Tuner):
    """SHERL's CNN form (methods §1.4): each tap max- and mean-pooled to the last grid and summed (a tap that is there
    already is doubled, as in the released code), 1 × 1 convolution and batch norm; redundancy and layer attention as
    everywhere; ReLU after the convolution and batch norm up; gate; the live last block.

    Parameters with tap widths Cᵢ and D = the last: Σ (Cᵢ d + 3d) + (d + 1) + (dD + 3D) + 1, and the norm's.
    """

    description = "SHERL on staged backbones"
    lr_pooled = 3e-3

    needs = (LiveLast,)
    tail: LiveTail

    def __init__(self, config: SherlConfig, backbone: Any, tail: LiveTail, wants: Want) -> None:
        super().__init__(config, backbone, tail, wants)
        inner = self.side_width(config, backbone, wants)
        self.names = self.states(config, backbone)
        self.down = nn.ModuleList(ConvNorm(backbone.state_width(n), inner) for n in self.names)
        self.score = nn.Linear(inner, 1) if config.blend in SCORED else None
        self.learned = learned(config.blend, len(self.names) - 1, inner)
        self.up = ConvNorm(inner, backbone.width)
        self.gate = nn.Parameter(torch.full((), 0.1 if config.gate is None else float(config.gate)))
        self.norm = backbone.norm(backbone.streams[-1])
        self.stream = backbone.streams[-1]
        self.features = {self.stream: rows_of(backbone, self.stream)}

    @classmethod
    def side_width(cls, config: Any, backbone: Backbone, wants: Want) -> int:
        """d."""
        return checked_reduction(config.reduction, backbone.width)

    @classmethod
    def refuse(cls, config: SherlConfig, backbone: Backbone) -> str | None:
        for name, usual in (("insert", "last"), ("tail", "frozen")):
            if (given := getattr(config, name)) != usual:
                return f"{name}: {backbone.name} backbones take {usual} only, not {given}"
        if config.recompute:
            return f"recompute: SHERL on {backbone.name} backbones keeps what it computes; leave it out"
        return no_live_block(backbone) or super().refuse(config, backbone)

    @classmethod
    def states(cls, config: SherlConfig, backbone: Backbone) -> list[str]:
        return taps(config, backbone, "sherl", live=True)

    def forward(self, batch: Batch) -> Features:
        with full_precision(batch.device):
            low = [down(rows) for down, rows in zip(self.down, self.pooled(batch), strict=True)]
            blended = mix(torch.stack(low[:-1], 1), low[-1], self.score, self.config.blend, self.learned, EPSILON)
            guide = batch.states[self.names[-1]].float()
            rows = F.relu(self.up(blended)) + torch.tanh(self.gate / self.config.temperature) * guide
        return {self.stream: self.norm(self.tail({self.stream: rows}, batch))}

    def pooled(self, batch: Batch) -> list[Tensor]:
        """Each tap on the last grid, (rows, its width)."""
        where, count = cells_of(self.backbone, batch), int(batch.lengths[self.stream].sum())
        found = []
        for name in self.names:
            rows, cell = batch.states[name].float(), where[name.split(".")[0]]
            found.append(2 * rows if cell is None else max_cells(rows, cell, count) + mean_cells(rows, cell, count))
        return found


@form("unipt", "pyramid")
class UniptConv(Tuner):
    """UniPT's CNN form (methods §3): a convolution of the last map weighs the positions of each finer one within their
    cell, on top of the plain mean; the weighted sums go through convolution and batch norm to the token attention, and
    what that gives through another convolution and batch norm.

    Parameters with widths Cᵢ of the n − 1 finer taps and D: Σ (D Cᵢ + Cᵢ + Cᵢ d + 3d) + (Dd + 3d) + (d + 1) +
    (d² + 3d) + dD + D.
    """

    description = "UniPT on staged backbones"
    lr_pooled = 3e-3

    def __init__(self, config: UniptConfig, backbone: Backbone, tail: Tail, wants: Want) -> None:
        super().__init__(config, backbone, tail, wants)
        inner, out = self.widths(config, backbone, wants)
        self.names = taps(config, backbone, "unipt", live=False)
        widths = [backbone.width_of(n.split(".")[0]) for n in self.names]
        self.guide = nn.ModuleList(nn.Linear(backbone.width, w) for w in widths[:-1])
        self.down = nn.ModuleList(ConvNorm(w, inner) for w in widths)
        self.aggregate = Aggregate(inner, ConvNorm(inner, inner))
        self.up = nn.Linear(inner, out)
        self.stream = backbone.streams[-1]
        self.features = {self.stream: rows_of(backbone, self.stream)}

    @classmethod
    def widths(cls, config: Any, backbone: Backbone, wants: Want) -> tuple[int, int]:
        """The side width, and that of what is handed out."""
        return checked_reduction(config.reduction, backbone.width), backbone.width

    @classmethod
    def states(cls, config: UniptConfig, backbone: Backbone) -> list[str]:
        return taps(config, backbone, "unipt", live=False)

    def forward(self, batch: Batch) -> Features:
        with full_precision(batch.device):
            where, top = cells_of(self.backbone, batch), batch.states[self.names[-1]].float()
            low = []
            for name, guide, down in zip(self.names[:-1], self.guide, self.down[:-1], strict=True):
                rows, cell = batch.states[name].float(), where[name.split(".")[0]]
                low.append(down(rows if cell is None else gathered(rows, F.relu(guide(top)), cell)))
            anchor = self.down[-1](top)
            return {self.stream: self.up(F.relu(self.aggregate(anchor, low, batch.layout(self.stream))))}


def gathered(rows: Tensor, guide: Tensor, cell: Tensor) -> Tensor:
    """Weighted sum of `rows` (fine, C) over each cell: rectified, l1-normalised products with `guide` (coarse, C), plus
    1 / k²."""
    products = F.relu((rows * guide[cell]).sum(-1, keepdim=True))
    total = sum_cells(products, cell, len(guide)) + EPSILON
    share = cell_counts(cell, len(guide)).to(rows.dtype).reciprocal()[:, None]
    return sum_cells(rows * (products / total[cell] + share[cell]), cell, len(guide))
