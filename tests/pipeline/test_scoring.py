"""What labels and freely written answers count as."""

from __future__ import annotations

import pytest

from pipeline.extract.tasks.base import TaskSpec
from pipeline.scoring import meaning, scorer

GRID = tuple(round(0.1 * i, 1) for i in range(51))
STSB = TaskSpec(
    "stsb", "regression", (), ("pearson",), ("a", "b"), "{0} {1}", tuple(f"{v:.1f}" for v in GRID), values=GRID
)
YES_NO = TaskSpec("mine", "classification", ("no", "yes"), ("accuracy",), ("a",), "{0}", ("0", "1"))
LABELS, ROUNDED = [4.25, 0.04, 3.75, 2.0], [4.2, 0.0, 3.8, 2.0]


def test_numbers_are_scored_against_the_texts_that_are_taught():
    assert scorer(STSB, "lm")(ROUNDED, LABELS)["pearson"] == pytest.approx(1.0, abs=1e-12)
    assert scorer(STSB, "pooled")(LABELS, LABELS)["pearson"] == pytest.approx(1.0, abs=1e-12)
    assert scorer(STSB, "pooled")(ROUNDED, LABELS)["pearson"] < 1 - 1e-6


def test_classes_are_scored_as_they_are():
    assert scorer(YES_NO, "lm")([0, 1, None], [0, 1, 1])["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("spec", "text", "value"),
    [
        (STSB, "3.8", 3.8),
        (STSB, " 3.85 ", 3.85),  # no target, yet a number: the papers' code takes it
        (STSB, "-7", -7.0),
        (STSB, "very", None),
        (YES_NO, "1 ", 1),
        (YES_NO, "yes", None),
    ],
)
def test_written_answers(spec, text, value):
    assert meaning(spec, text) == value
