"""The next token of a text, by a language model's own frozen head: cross entropy over the tokens to be learned.

The row at a position predicts the token after it. Which tokens are targets extraction has found (`extract.completion`):
all of a text, a completion, what the assistant says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.extract.batch import Batch
from pipeline.extract.completion import learned
from pipeline.store.errors import UserError
from pipeline.train.configs import ObjectiveConfig
from pipeline.train.features import Feature, Features, Want
from pipeline.train.fit.finite import refuse_nan
from pipeline.train.objectives.base import Head, Objective, Outputs, Scorer, Vocabulary, register_objective
from pipeline.train.objectives.linear_entropy import entropy_and_hits, summed_entropy

USUAL = ("loss", "perplexity", "token_accuracy")


class CompletionHead(Head):
    """No parameters: logits come from `vocabulary` on the rows of the feature `name`, a few rows at a time."""

    vocabulary: Vocabulary

    def __init__(self, name: str, feature: Feature, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.name, self.stream = name, feature.stream
        object.__setattr__(self, "vocabulary", vocabulary)  # not this module's

    def targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(n,) the rows that predict a target, and (n,) the tokens they predict. Raises UserError where what is known
        of the samples does not fit their tokens."""
        if batch.targets is not None:
            learn = batch.targets["learn"]
        else:
            learn = torch.from_numpy(np.concatenate([learned(meta) for meta in batch.metas])).to(batch.device)
        ids = batch.columns[f"{self.stream}.ids"]
        if len(learn) != len(ids):
            raise UserError(f"the task table tells of {len(learn)} tokens where {len(ids)} are stored; extract again")
        places = learn.nonzero()[:, 0]
        return places - 1, ids[places]

    def losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        """The mean over the batch's targets."""
        rows, tokens = self.targets(batch)
        found = features[self.name][rows]
        frozen = not any(p.requires_grad for p in self._parameters_of_the_head())
        total = summed_entropy(found, tokens, self.vocabulary.logits, self.width(found), frozen)
        return {"token": total / max(1, len(tokens))}

    def weight(self, batch: Batch) -> float:
        """Targets, not samples."""
        assert batch.targets is not None
        return float(batch.targets["learn"].sum())

    def predict(self, features: Features, batch: Batch) -> Outputs:
        """Of each sample, over its targets: the summed cross entropy `loss`, how many `hits`, how many `tokens`."""
        rows, tokens = self.targets(batch)
        found = features[self.name][rows]
        entropy, hit = entropy_and_hits(found, tokens, self.vocabulary.logits, self.width(found))
        sample = batch.layout(self.stream).sample[rows]
        sums = torch.zeros(3, len(batch), dtype=torch.float64, device=found.device)
        for out, values in zip(sums, (refuse_nan(entropy), hit, torch.ones_like(hit)), strict=True):
            out.index_add_(0, sample, values.double())
        return {"loss": sums[0], "hits": sums[1], "tokens": sums[2]}

    def width(self, rows: Tensor) -> int:
        """Entries of the vocabulary."""
        return int(self.vocabulary.logits(rows[:0]).shape[1])

    def _parameters_of_the_head(self) -> list[nn.Parameter]:
        return list(self.vocabulary.parameters()) if isinstance(self.vocabulary, nn.Module) else []


class CompletionScorer(Scorer):
    """Nats a target, their perplexity, and the share of targets that were the most likely token: those of `names`, the
    first of which selects the best epoch."""

    def __init__(self, names: Sequence[str] = USUAL) -> None:
        self.names = tuple(names)
        self.loss = self.hits = self.tokens = 0.0

    @property
    def first(self) -> str:
        return self.names[0]

    def update(self, out: Outputs, batch: Batch) -> None:
        self.loss += float(out["loss"].sum())
        self.hits += float(out["hits"].sum())
        self.tokens += float(out["tokens"].sum())

    def merge(self, other: CompletionScorer) -> None:
        self.loss, self.hits, self.tokens = self.loss + other.loss, self.hits + other.hits, self.tokens + other.tokens

    def compute(self) -> dict[str, float]:
        loss = self.loss / self.tokens
        figures = {"loss": loss, "perplexity": perplexity(loss), "token_accuracy": self.hits / self.tokens}
        return {name: figures[name] for name in self.names}


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is beyond double precision."""
    return math.exp(loss) if loss < 700 else math.inf


@register_objective("completion", ObjectiveConfig)
class Completion(Objective):
    """Targets are tokens of the text itself. Metas say how many `tokens` a sample has and which spans of positions are
    to `learn`."""

    description = "the next token of a text, by a language model's frozen head"
    figures = USUAL
    targets = ("tokens",)
    wants = Want(kinds=("sequence",), text_head=True)
    continues_text = True
    unlabelled = True
    counts = "tokens"

    def encode(self, target: Any, meta: Mapping[str, Any]) -> dict[str, Any]:
        return {"learn": learned(meta)}

    def head(self, features: Mapping[str, Feature], vocabulary: Vocabulary) -> CompletionHead:
        ((name, feature),) = features.items()
        return CompletionHead(name, feature, vocabulary)

    def scorer(self) -> CompletionScorer:
        return CompletionScorer(self.metrics)

    def entries(self, out: Outputs) -> list[dict[str, Any]]:
        return [_entry(*told) for told in zip(*(out[n].tolist() for n in ("loss", "hits", "tokens")), strict=True)]

    def joined(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Over all tokens of a text's windows."""
        counts = [entry["tokens"] for entry in entries]
        means = ([entry[name] for entry in entries] for name in ("loss", "token_accuracy"))
        loss, hits = (float(np.dot(counts, mean)) for mean in means)
        return _entry(loss, hits, sum(counts))


def _entry(loss: float, hits: float, tokens: float) -> dict[str, Any]:
    """Of sums over `tokens` targets."""
    loss = loss / tokens
    return {"loss": loss, "perplexity": perplexity(loss), "token_accuracy": hits / tokens, "tokens": int(tokens)}
