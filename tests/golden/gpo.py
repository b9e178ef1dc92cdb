"""Generalised pooling of VSE∞ (Chen et al., CVPR 2021), to read out the cases whose gradients come through it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Gpo(nn.Module):
    """Weights of sorted values by place: a bidirectional GRU over sine positions, both directions' mean, one map,
    softmax of scores / 0.1."""

    def __init__(self, positions: int = 32, hidden: int = 32, temperature: float = 0.1) -> None:
        super().__init__()
        self.positions, self.temperature = positions, temperature
        self.gru = nn.GRU(positions, hidden, 1, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(hidden, 1, bias=False)

    def forward(self, grid: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) of `lengths` (B,) → (B, D) and the weights (B, L, 1)."""
        longest = int(lengths.max())
        at = torch.arange(longest, dtype=torch.float32)[:, None]
        rate = torch.exp(torch.arange(0, self.positions, 2) * -(torch.log(torch.tensor(10000.0)) / self.positions))
        table = torch.stack([(at * rate).sin(), (at * rate).cos()], -1).flatten(1)
        packed = pack_padded_sequence(table.expand(len(lengths), -1, -1), lengths, True, enforce_sorted=False)
        both = pad_packed_sequence(self.gru(packed)[0], batch_first=True)[0]
        scores = self.linear(both.view(*both.shape[:2], 2, -1).mean(2))
        mask = torch.arange(longest)[None, :, None] < lengths[:, None, None]
        weights = (scores.masked_fill(~mask, -10000) / self.temperature).softmax(1)
        ranked = grid[:, :longest].masked_fill(~mask, -10000).sort(1, descending=True)[0].masked_fill(~mask, 0)
        return (ranked * weights).sum(1), weights
