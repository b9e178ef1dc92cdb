"""Generalised pooling (GPO; Chen et al., "Learning the best pooling strategy for visual semantic embedding", CVPR
2021).

The values of each channel are sorted over a sample's positions, and each place in that order has a weight: the mean of
places is mean pooling, the first place alone maximum pooling. The weights follow from the number of positions alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pipeline.extract.batch import Layout

OUTSIDE = -10000.0  # stands at padding, as in the released code


class Gpo(nn.Module):
    """Weights by place: a bidirectional GRU over sine positions, the mean of both directions, one linear map without
    bias, softmax of scores / `temperature`. Parameters at 32 positions and width 32: 12,704."""

    def __init__(self, positions: int = 32, hidden: int = 32, temperature: float = 0.1) -> None:
        super().__init__()
        self.positions, self.temperature = positions, temperature
        self.gru = nn.GRU(positions, hidden, 1, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(hidden, 1, bias=False)

    def weights(self, lengths: np.ndarray, device: torch.device) -> Tensor:
        """(B, L) of samples of `lengths` (B,) on the host: the weight of each place, 0 at padding."""
        # Samples of one length have the same weights: each length goes through the network once.
        alike, which = np.unique(np.asarray(lengths, np.int64), return_inverse=True)
        longest = int(alike.max(initial=0))
        at = torch.arange(longest, dtype=torch.float32, device=device)[:, None]
        step = torch.arange(0, self.positions, 2, device=device) * -(np.log(10000.0) / self.positions)
        table = torch.stack([(at * step.exp()).sin(), (at * step.exp()).cos()], -1).flatten(1)
        grid = table.expand(len(alike), -1, -1)
        packed = pack_padded_sequence(grid, torch.from_numpy(alike), True, enforce_sorted=False)
        both = pad_packed_sequence(self.gru(packed)[0], batch_first=True)[0]
        scores = self.linear(both.unflatten(2, (2, -1)).mean(2))[..., 0]
        mask = torch.arange(longest, device=device)[None] < torch.from_numpy(alike).to(device)[:, None]
        shares = (scores.masked_fill(~mask, OUTSIDE) / self.temperature).softmax(1)
        return shares.index_select(0, torch.from_numpy(which.reshape(-1)).to(device))

    def forward(self, rows: Tensor, layout: Layout) -> Tensor:
        """`rows` (rows, D), packed as `layout` says → (B, D), float32."""
        lengths = layout.lengths.cpu().numpy()
        # Three times as fast on a CPU as along a dimension that is not the last.
        by_channel = layout.pad(rows.float(), OUTSIDE).transpose(1, 2).contiguous()
        ranked = by_channel.sort(2, descending=True).values.masked_fill(~layout.mask[:, None], 0.0)
        return torch.einsum("bdl,bl->bd", ranked, self.weights(lengths, rows.device))
