"""A label as text, written by a text-to-text backbone's frozen head: token cross entropy, greedy choice among labels.

Targets are known token sequences (class labels as text, or the grid of a regression). Scoring walks the trie of
targets: at each decoder position the most likely token that continues some target is taken. That is greedy decoding
restricted to the targets, and equals free greedy decoding whenever that stays within them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.extract.batch import Batch
from pipeline.extract.completion import learned, shared
from pipeline.extract.tasks.base import nearest
from pipeline.store.errors import UserError
from pipeline.train.configs import ObjectiveConfig
from pipeline.train.features import Feature, Features, Want
from pipeline.train.fit.finite import refuse_nan
from pipeline.train.objectives.base import Answers, Head, Outputs, Vocabulary, register_objective
from pipeline.train.objectives.completion import CompletionHead
from pipeline.train.objectives.scores import ScalarObjective

IGNORE = -100


class TextHead(Head):
    """No parameters: logits come from `vocabulary` on the rows of the feature `name`. `candidates`: token ids of each
    target; `values`: the number each target stands for, for a regression."""

    table: Tensor
    values: Tensor

    def __init__(
        self, name: str, vocabulary: Vocabulary, candidates: Sequence[Sequence[int]], values: Sequence[float] = ()
    ) -> None:
        super().__init__()
        self.name = name
        object.__setattr__(self, "vocabulary", vocabulary)  # frozen, and not this module's
        longest = max((len(c) for c in candidates), default=1)
        table = torch.full((len(candidates), longest), IGNORE)
        for i, target in enumerate(candidates):
            table[i, : len(target)] = torch.tensor(list(target))
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("values", torch.tensor(list(values), dtype=torch.float32), persistent=False)

    vocabulary: Vocabulary

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
        assert batch.targets is not None
        layout = batch.layout("decoder")
        ids, parent = batch.columns["decoder.ids"], batch.columns["decoder.parent"]
        target = self.table[self.target_of(batch.targets["label"])][layout.sample]
        above = (layout.first[layout.sample] + parent).clamp(min=0)
        on_path, depth = parent < 0, torch.zeros_like(parent)
        for d in range(1, self.table.shape[1]):
            step = ~on_path & (parent >= 0) & on_path[above] & (depth[above] == d - 1) & (ids == target[:, d - 1])
            on_path, depth = on_path | step, depth.masked_fill(step, d)
        return torch.where(on_path, target.gather(1, depth[:, None])[:, 0], IGNORE)

    def losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        """Mean token cross entropy over the target positions; vocabulary logits are made for those rows only."""
        rows, tokens = features[self.name], self.gold_tokens(batch)
        if not bool((tokens != IGNORE).all()):
            at = (tokens != IGNORE).nonzero()[:, 0]
            rows, tokens = rows[at], tokens[at]
        return {"token": F.cross_entropy(self.vocabulary.logits(rows).float(), tokens)}

    def weight(self, batch: Batch) -> float:
        """Tokens of the targets, not samples."""
        return float((self.gold_tokens(batch) != IGNORE).sum())

    def choose(self, rows: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B,) index of the target that greedy decoding among the targets ends in, and its probability: the product
        over the positions where targets part, each among the tokens that go on. Raises NotFinite for NaN."""
        layout = batch.layout("decoder")
        ids, parent = batch.columns["decoder.ids"], batch.columns["decoder.parent"]
        above = layout.first[layout.sample] + parent
        tokens = self.table[self.table != IGNORE].unique()
        logits = refuse_nan(self.vocabulary.logits(rows, tokens).float())
        column = torch.searchsorted(tokens, self.table.clamp(min=0))
        column = column.clamp(max=len(tokens) - 1)
        node = layout.first.clone()
        alive = torch.ones(len(batch), len(self.table), dtype=torch.bool, device=rows.device)
        chance = torch.ones(len(batch), device=rows.device)
        for d in range(self.table.shape[1]):
            goes_on = alive & (self.table[:, d] != IGNORE)[None, :]
            open_ = goes_on.sum(1) > 1
            score = logits[node].gather(1, column[:, d].expand(len(batch), -1)).masked_fill(~goes_on, -torch.inf)
            best = score.argmax(1)
            token = self.table[best, d]
            alive = torch.where(open_[:, None], goes_on & (self.table[:, d][None, :] == token[:, None]), alive)
            chance = torch.where(open_, chance * self._share(logits[node], column[:, d], goes_on, best), chance)
            child = (parent >= 0) & (above == node[layout.sample]) & (ids == token[layout.sample])
            at = child.nonzero()[:, 0]
            node = node.index_copy(0, layout.sample[at], at)
        return alive.int().argmax(1), chance

    @staticmethod
    def _share(logits: Tensor, column: Tensor, goes_on: Tensor, best: Tensor) -> Tensor:
        """(B,) probability of the best target's token among the distinct tokens of those that go on."""
        times = torch.zeros_like(logits).scatter_add(1, column.expand(len(logits), -1), goes_on.to(logits.dtype))
        share = logits.masked_fill(times == 0, -torch.inf).softmax(1)
        return share.gather(1, column[best][:, None])[:, 0].nan_to_num(1.0)

    def predict(self, features: Features, batch: Batch) -> Outputs:
        """`label`: class indices, or the values of the chosen targets; and their `probability`."""
        chosen, chance = self.choose(features[self.name], batch)
        return {"label": self.values[chosen] if len(self.values) else chosen, "probability": chance}


class ContinuedHead(CompletionHead):
    """An answer that goes on with its question: in training its tokens are targets. Answers differ in their first
    token behind what all begin with, so the row before that decides as greedy decoding among them does."""

    tokens: Tensor

    def __init__(
        self, name: str, feature: Feature, vocabulary: Vocabulary, candidates: Sequence[Sequence[int]]
    ) -> None:
        super().__init__(name, feature, vocabulary)
        place = shared(candidates)
        self.register_buffer("tokens", torch.tensor([ids[place] for ids in candidates]), persistent=False)

    def predict(self, features: Features, batch: Batch) -> Outputs:
        """`label`: class indices, and their `probability` among the classes."""
        if batch.targets is not None:
            place = batch.targets["decide"]
        else:
            place = torch.tensor([meta["decide"] for meta in batch.metas], device=batch.device)
        layout = batch.layout(self.stream)
        if bool(((place < 0) | (place >= layout.lengths)).any()):
            raise UserError("the task table tells of positions that samples do not have; extract again")
        logits = self.vocabulary.logits(features[self.name][layout.first + place], self.tokens)
        chance, label = refuse_nan(logits.float()).softmax(-1).max(-1)
        return {"label": label, "probability": chance}


@register_objective("label-text", ObjectiveConfig)
class LabelText(ScalarObjective):
    """Targets are classes or numbers, each answered by the text the task gives it (T5's way)."""

    description = "the label's text, by the frozen head of a text-to-text backbone"
    targets = ("class", "number")
    wants = Want(kinds=("sequence",), text_head=True)
    counts = "tokens"

    def __init__(self, config: ObjectiveConfig, answers: Answers) -> None:
        super().__init__(config, answers)
        if not answers.token_ids:
            raise UserError("objective label-text: the task gives no target texts")

    def encode(self, target: Any, meta: Mapping[str, Any]) -> dict[str, Any]:
        if self.answers.continued:
            if "decide" not in meta:
                raise UserError("the task table does not say where rows are answered; extract again")
            return {"label": np.int64(target), "learn": learned(meta), "decide": np.int64(meta["decide"])}
        # In double precision: the target's text is found by rounding, and float32 would round some apart.
        return {"label": np.float64(target) if self.answers.values else np.int64(target)}

    def head(self, features: Mapping[str, Feature], vocabulary: Vocabulary) -> Head:
        ((name, feature),) = features.items()
        if self.answers.continued:
            return ContinuedHead(name, feature, vocabulary, self.answers.token_ids)
        return TextHead(name, vocabulary, self.answers.token_ids, self.answers.values)

    def truth(self, labels: Sequence[float] | np.ndarray) -> list[float]:
        """Labels as they are taught: a number is scored against the text it was rounded to, as in the papers' code."""
        values = self.answers.values
        return [values[nearest(values, label)] for label in labels] if values else list(labels)

    def meaning(self, text: str) -> int | float | None:
        """What a freely written answer says: the class whose text it is, or any number, on the grid or not; else
        None."""
        if not self.answers.values:
            return self.answers.texts.index(text.strip()) if text.strip() in self.answers.texts else None
        try:
            return float(text)
        except ValueError:
            return None

    def entries(self, out: Outputs) -> list[dict[str, Any]]:
        named = self.answers.labels if not self.answers.values else ()
        pairs = zip(out["label"].tolist(), out["probability"].tolist(), strict=True)
        return [{"label": named[label] if named else label, "probability": chance} for label, chance in pairs]
