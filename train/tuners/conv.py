"""SHERL and UniPT on staged backbones (CNNs, Swin): maps of all stages brought to the last one's grid, then position
by position.

A 1 × 1 convolution with batch norm on maps is a linear map with batch norm on packed rows, so pictures of any size go
together without padding. "Cells" are the fine positions under one position of the last grid; where sizes divide,
pooling over cells is pooling with kernel = stride.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.extract.backbones.base import Family, Tail
from pipeline.extract.backbones.batch import Batch
from pipeline.extract.backbones.grids import cell_counts, cells, max_cells, mean_cells, sizes, sum_cells
from pipeline.store.errors import UserError
from pipeline.train.features import Features, Want
from pipeline.train.tuners.base import Tuner, TunerConfig, checked_reduction, form, full_precision, rows_of
from pipeline.train.tuners.livelayers import refuse
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


def taps(config: TunerConfig, family: Family, method: str, live: bool) -> list[str]:
    """The output of every stage; of the last, where its last block is live, that of the block before.

    Raises UserError for chosen layers: which positions of which stage would be meant is not said by numbers; and where
    the last stage has no block before its live one.
    """
    if config.layers:
        raise UserError(f"layers: {method} on {family.name} backbones reads every stage; there is nothing to choose")
    names = [f"{s}.{family.depth(s) - 1}" for s in family.streams]
    if live:
        last = family.streams[-1]
        if family.depth(last) < 2:
            raise UserError(
                f"SHERL's live layer is the last of two blocks or more of one width; {last} of {family.name} backbones "
                "has a single one"
            )
        names[-1] = f"{last}.{family.depth(last) - 2}"
    return names


def cells_of(family: Family, batch: Batch) -> dict[str, Tensor | None]:
    """For each stream, the row of the last stage's map above each of its rows; None for the last stage itself."""
    last = sizes(batch, family.streams, family.streams[-1])
    out: dict[str, Tensor | None] = {}
    for stream in family.streams:
        shape = sizes(batch, family.streams, stream)
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

    def __init__(self, config: SherlConfig, family: Family, tail: Tail, wants: Want) -> None:
        super().__init__(config, family, tail, wants)
        refuse({"insert": config.insert, "tail": config.tail}, family)
        if config.recompute:
            raise UserError(f"recompute: SHERL on {family.name} backbones keeps what it computes; leave it out")
        inner = checked_reduction(config.reduction, family.width)
        self.names = taps(config, family, "sherl", live=True)
        self.down = nn.ModuleList(ConvNorm(family.width_of(n.split(".")[0]), inner) for n in self.names)
        self.score = nn.Linear(inner, 1) if config.blend in SCORED else None
        self.learned = learned(config.blend, len(self.names) - 1, inner)
        self.up = ConvNorm(inner, family.width)
        self.gate = nn.Parameter(torch.full((), 0.1 if config.gate is None else float(config.gate)))
        self.norm = family.norm(family.streams[-1])
        self.stream = family.streams[-1]
        self.features = {self.stream: rows_of(family, self.stream)}

    @classmethod
    def states(cls, config: SherlConfig, family: Family) -> list[str]:
        return taps(config, family, "sherl", live=True)

    def forward(self, batch: Batch) -> Features:
        with full_precision(batch.device):
            where, count = cells_of(self.family, batch), int(batch.lengths[self.stream].sum())
            low = []
            for down, name in zip(self.down, self.names, strict=True):
                rows, cell = batch.states[name].float(), where[name.split(".")[0]]
                pooled = 2 * rows if cell is None else max_cells(rows, cell, count) + mean_cells(rows, cell, count)
                low.append(down(pooled))
            blended = mix(torch.stack(low[:-1], 1), low[-1], self.score, self.config.blend, self.learned, EPSILON)
            guide = batch.states[self.names[-1]].float()
            rows = F.relu(self.up(blended)) + torch.tanh(self.gate / self.config.temperature) * guide
        return {self.stream: self.norm(self.tail({self.stream: rows}, batch))}


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

    def __init__(self, config: UniptConfig, family: Family, tail: Tail, wants: Want) -> None:
        super().__init__(config, family, tail, wants)
        inner = checked_reduction(config.reduction, family.width)
        self.names = taps(config, family, "unipt", live=False)
        widths = [family.width_of(n.split(".")[0]) for n in self.names]
        self.guide = nn.ModuleList(nn.Linear(family.width, w) for w in widths[:-1])
        self.down = nn.ModuleList(ConvNorm(w, inner) for w in widths)
        self.aggregate = Aggregate(inner, ConvNorm(inner, inner))
        self.up = nn.Linear(inner, family.width)
        self.stream = family.streams[-1]
        self.features = {self.stream: rows_of(family, self.stream)}

    @classmethod
    def states(cls, config: UniptConfig, family: Family) -> list[str]:
        return taps(config, family, "unipt", live=False)

    def forward(self, batch: Batch) -> Features:
        with full_precision(batch.device):
            where, top = cells_of(self.family, batch), batch.states[self.names[-1]].float()
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
