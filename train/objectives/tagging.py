"""A tag for each word: cross entropy at the first sub-token of every word, scored by spans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.extract.batch import Batch
from pipeline.train.configs import ObjectiveConfig
from pipeline.train.features import Feature, Features, Want
from pipeline.train.fit.finite import refuse_nan
from pipeline.train.objectives.base import Head, Objective, Outputs, Report, Scorer, Vocabulary, register_objective
from pipeline.train.objectives.reports import shares
from pipeline.train.objectives.spans import OUTSIDE, SpanCounts

IGNORE = -100
USUAL = ("f1", "precision", "recall", "accuracy")


def first_positions(words: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of positions' words (-1 for none): the positions at which a word begins, and which word it is."""
    of = np.asarray(words, np.int64)
    first = np.flatnonzero((of >= 0) & (of != np.concatenate([[-2], of[:-1]])))
    return first, of[first]


class TagHead(Head):
    """Logits of the tags at every position of one feature. Parameters: (width + 1) · tags."""

    def __init__(self, name: str, feature: Feature, tags: int) -> None:
        super().__init__()
        self.name, self.stream = name, feature.stream
        self.linear = nn.Linear(feature.width, tags)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        assert batch.targets is not None
        logits, tags = self.linear(features[self.name].float()).float(), batch.targets["tag"]
        total = F.cross_entropy(logits, tags, ignore_index=IGNORE, reduction="sum")
        return {"tag": total / (tags != IGNORE).sum().clamp(min=1)}

    def weight(self, batch: Batch) -> float:
        """Words, not samples."""
        assert batch.targets is not None
        return float((batch.targets["tag"] != IGNORE).sum())

    def predict(self, features: Features, batch: Batch) -> Outputs:
        """`tags`: for each sample the tag of each word, None for words that were cut off."""
        best = refuse_nan(self.linear(features[self.name].float())).argmax(-1).cpu().numpy()
        begin = np.concatenate([[0], np.cumsum(batch.lengths[self.stream])])
        told: list[list[int | None]] = []
        for i, meta in enumerate(batch.metas):
            positions, words = first_positions(meta["word"])
            tags: list[int | None] = [None] * int(meta["words"])
            for position, word in zip(positions, words, strict=True):
                tags[int(word)] = int(best[begin[i] + position])
            told.append(tags)
        return {"tags": told}


class TagScorer(Scorer):
    """Precision, recall and F1 of spans by CoNLL's rules, and the share of words with the right tag: those of `names`,
    the first of which selects the best epoch. A word that was cut off counts as outside."""

    def __init__(self, tags: Sequence[str], names: Sequence[str] = USUAL) -> None:
        self.tags, self.names, self.spans = tuple(tags), tuple(names), SpanCounts()
        self.right = self.words = 0

    @property
    def first(self) -> str:
        return self.names[0]

    def update(self, out: Outputs, batch: Batch) -> None:
        for guess, real in sequences(self.tags, out, batch):
            self.spans.update(guess, real)
            self.right += sum(a == b for a, b in zip(guess, real, strict=True))
            self.words += len(real)

    def merge(self, other: TagScorer) -> None:
        self.spans.merge(other.spans)
        self.right, self.words = self.right + other.right, self.words + other.words

    def compute(self) -> dict[str, float]:
        figures = {**self.spans.figures(), "accuracy": self.right / self.words if self.words else 0.0}
        return {name: figures[name] for name in self.names}


class SpanReport(Report):
    """Precision, recall, F1 and support of each type of span, and the means over them."""

    def __init__(self, tags: Sequence[str]) -> None:
        self.tags, self.spans = tuple(tags), SpanCounts()

    def update(self, out: Outputs, batch: Batch) -> None:
        for guess, real in sequences(self.tags, out, batch):
            self.spans.update(guess, real)

    def compute(self) -> dict[str, Any]:
        return shares(*self.spans.by_type())


def sequences(tags: Sequence[str], out: Outputs, batch: Batch) -> Iterator[tuple[list[str], list[str]]]:
    """The tags of each sample's words as told and as they are; a word that was cut off is told to be outside."""
    assert batch.targets is not None
    ends = batch.targets["truth.n"].cumsum(0).tolist()
    truth = batch.targets["truth"].tolist()
    for told, end in zip(out["tags"], ends, strict=True):
        yield [OUTSIDE if t is None else tags[t] for t in told], [tags[t] for t in truth[end - len(told) : end]]


@register_objective("tagging", ObjectiveConfig)
class Tagging(Objective):
    """Targets are lists of tag indices, one a word. Metas say which word a position belongs to (`word`, -1 for none)
    and how many words there are (`words`)."""

    description = "a tag for each word: a trainable linear map at the first sub-token of every word"
    figures = USUAL
    targets = ("tags",)
    wants = Want(kinds=("sequence",))
    counts = "words"

    def encode(self, target: Sequence[int], meta: Mapping[str, Any]) -> dict[str, Any]:
        tags = np.full(len(meta["word"]), IGNORE, np.int64)
        positions, words = first_positions(meta["word"])
        truth = np.asarray(target, np.int64)
        tags[positions] = truth[words]
        return {"tag": tags, "truth": truth}

    def head(self, features: Mapping[str, Feature], vocabulary: Vocabulary) -> TagHead:
        ((name, feature),) = features.items()
        return TagHead(name, feature, len(self.answers.labels))

    def scorer(self) -> TagScorer:
        return TagScorer(self.answers.labels, self.metrics)

    def report(self) -> SpanReport:
        return SpanReport(self.answers.labels)

    def entries(self, out: Outputs) -> list[dict[str, Any]]:
        return [{"tags": [None if t is None else self.answers.labels[t] for t in told]} for told in out["tags"]]
