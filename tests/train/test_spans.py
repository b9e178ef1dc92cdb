"""Spans of tags as CoNLL's evaluation counts them."""

from __future__ import annotations

import pytest

from pipeline.train.objectives.spans import SpanCounts, spans


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-PER I-PER O B-LOC", {("PER", 0, 1), ("LOC", 3, 3)}),
        ("B-PER B-PER", {("PER", 0, 0), ("PER", 1, 1)}),
        ("I-PER I-PER B-PER", {("PER", 0, 1), ("PER", 2, 2)}),  # IOB1
        ("O I-LOC", {("LOC", 1, 1)}),  # a stray inside tag begins a span
        ("B-PER I-LOC", {("PER", 0, 0), ("LOC", 1, 1)}),  # and so does another type
        ("S-A B-B I-B E-B E-B", {("A", 0, 0), ("B", 1, 3), ("B", 4, 4)}),  # IOBES
        ("U-A B-B L-B I-B", {("A", 0, 0), ("B", 1, 2), ("B", 3, 3)}),  # BILOU
        ("O O", set()),
        ("", set()),
        ("NN NN VB", {("NN", 0, 1), ("VB", 2, 2)}),  # tags without a prefix
        ("B-in-law I-in-law", {("in-law", 0, 1)}),
    ],
)
def test_spans(tags: str, found: set[tuple[str, int, int]]) -> None:
    assert spans(tags.split()) == found


def test_figures_on_a_fixture_counted_by_hand() -> None:
    """Told 5 spans, there are 5, right are 2: B-LOC at 3 in the first, and the whole of the second."""
    counts = SpanCounts()
    counts.update(["B-PER", "O", "O", "B-LOC", "O", "B-ORG"], ["B-PER", "I-PER", "O", "B-LOC", "O", "O"])
    counts.update(["B-MISC", "I-MISC", "O"], ["B-MISC", "I-MISC", "O"])
    other = SpanCounts()
    other.update(["O", "B-PER"], ["B-PER", "O"])
    other.update(["O", "O"], ["O", "B-ORG"])
    counts.merge(other)
    precision, recall = 2 / 5, 2 / 5
    assert counts.figures() == pytest.approx({"f1": 0.4, "precision": precision, "recall": recall})
    assert SpanCounts().figures() == {"f1": 0.0, "precision": 0.0, "recall": 0.0}
