"""Language-model readout of text-to-text backbones: token cross entropy on the target, greedy choice among targets.

Targets are known token sequences (class labels as text, or the grid of a regression). Scoring walks the trie of
targets: at each decoder position the most likely token that continues some target is taken. That is greedy decoding
restricted to the targets, and equals free greedy decoding whenever that stays within them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.extract.backbones.batch import Batch
from pipeline.train.finite import refuse_nan

IGNORE = -100


class Vocabulary(Protocol):
    """What has a language-model head: a tail, or a live backbone."""

    def logits(self, rows: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(rows, width) → (rows, vocabulary), or only the columns `tokens`."""


class LMHead(nn.Module):
    """No parameters: logits come from the head of `tail`. `candidates`: token ids of each target; `values`: the
    number each target stands for, for a regression."""

    table: Tensor
    values: Tensor

    def __init__(self, tail: Vocabulary, candidates: Sequence[Sequence[int]], values: Sequence[float] = ()) -> None:
        super().__init__()
        object.__setattr__(self, "tail", tail)
        longest = max((len(c) for c in candidates), default=1)
        table = torch.full((len(candidates), longest), IGNORE)
        for i, target in enumerate(candidates):
            table[i, : len(target)] = torch.tensor(list(target))
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("values", torch.tensor(list(values), dtype=torch.float32), persistent=False)

    tail: Vocabulary

    def target_of(self, labels: Tensor) -> Tensor:
        """(B,) labels → (B,) index of each sample's target; for a regression the nearest value of the grid."""
        if not len(self.values):
            return labels
        # The same rounding as TaskSpec.target_index (half to even, in double precision), which chose the inputs.
        low, high = float(self.values[0]), float(self.values[-1])
        per_unit = round((len(self.values) - 1) / (high - low), 6)
        return (torch.round(labels.double() * per_unit) - round(low * per_unit)).long().clamp(0, len(self.values) - 1)

    def gold_tokens(self, batch: Batch) -> Tensor:
        """(rows,) the next token of the sample's own target at each decoder position on its path, else IGNORE."""
        assert batch.labels is not None
        layout = batch.layout("decoder")
        ids, parent = batch.columns["decoder.ids"], batch.columns["decoder.parent"]
        target = self.table[self.target_of(batch.labels)][layout.sample]
        above = (layout.first[layout.sample] + parent).clamp(min=0)
        on_path, depth = parent < 0, torch.zeros_like(parent)
        for d in range(1, self.table.shape[1]):
            step = ~on_path & (parent >= 0) & on_path[above] & (depth[above] == d - 1) & (ids == target[:, d - 1])
            on_path, depth = on_path | step, depth.masked_fill(step, d)
        return torch.where(on_path, target.gather(1, depth[:, None])[:, 0], IGNORE)

    def loss(self, rows: Tensor, batch: Batch) -> Tensor:
        """Mean token cross entropy over the target positions; vocabulary logits are made for those rows only."""
        tokens = self.gold_tokens(batch)
        if not bool((tokens != IGNORE).all()):
            at = (tokens != IGNORE).nonzero()[:, 0]
            rows, tokens = rows[at], tokens[at]
        return F.cross_entropy(self.tail.logits(rows).float(), tokens)

    def choose(self, rows: Tensor, batch: Batch) -> Tensor:
        """(B,) index of the target that greedy decoding among the targets ends in. Raises NotFinite for NaN."""
        layout = batch.layout("decoder")
        ids, parent = batch.columns["decoder.ids"], batch.columns["decoder.parent"]
        above = layout.first[layout.sample] + parent
        tokens = self.table[self.table != IGNORE].unique()
        logits = refuse_nan(self.tail.logits(rows, tokens).float())
        column = torch.searchsorted(tokens, self.table.clamp(min=0))
        column = column.clamp(max=len(tokens) - 1)
        node = layout.first.clone()
        alive = torch.ones(len(batch), len(self.table), dtype=torch.bool, device=rows.device)
        for d in range(self.table.shape[1]):
            goes_on = alive & (self.table[:, d] != IGNORE)[None, :]
            open_ = goes_on.sum(1) > 1
            score = logits[node].gather(1, column[:, d].expand(len(batch), -1)).masked_fill(~goes_on, -torch.inf)
            token = self.table[score.argmax(1), d]
            alive = torch.where(open_[:, None], goes_on & (self.table[:, d][None, :] == token[:, None]), alive)
            child = (parent >= 0) & (above == node[layout.sample]) & (ids == token[layout.sample])
            at = child.nonzero()[:, 0]
            node = node.index_copy(0, layout.sample[at], at)
        return alive.int().argmax(1)

    def predict(self, rows: Tensor, batch: Batch) -> Tensor:
        """(B,) class indices, or the values of the chosen targets."""
        chosen = self.choose(rows, batch)
        return self.values[chosen] if len(self.values) else chosen
