"""What labels and freely written answers count as under label-text."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.train.configs import PooledConfig
from pipeline.train.objectives import Answers, ObjectiveConfig
from pipeline.train.objectives.label_text import LabelText
from pipeline.train.objectives.regression import Regression
from pipeline.train.objectives.scores import ScalarScorer

GRID = tuple(round(0.1 * i, 1) for i in range(51))
TEXTS = tuple(f"{v:.1f}" for v in GRID)
STSB = LabelText(ObjectiveConfig(), Answers((), ("pearson",), TEXTS, tuple((i + 2, 1) for i in range(51)), GRID))
YES_NO = LabelText(ObjectiveConfig(), Answers(("no", "yes"), ("accuracy",), ("0", "1"), ((5, 1), (6, 1))))
POOLED = Regression(PooledConfig(), Answers((), ("pearson",)))
LABELS, ROUNDED = [4.25, 0.04, 3.75, 2.0], [4.2, 0.0, 3.8, 2.0]


def pearson(scorer: ScalarScorer, told: list[float]) -> float:
    scorer._seen.append((np.arange(4), np.array(told), np.array(LABELS)))
    return scorer.compute()["pearson"]


def test_numbers_are_scored_against_the_texts_that_are_taught():
    assert pearson(STSB.scorer(), ROUNDED) == pytest.approx(1.0, abs=1e-12)
    assert pearson(POOLED.scorer(), LABELS) == pytest.approx(1.0, abs=1e-12)
    assert pearson(POOLED.scorer(), ROUNDED) < 1 - 1e-6


def test_classes_are_scored_as_they_are():
    assert YES_NO.truth([0, 1, 1]) == [0, 1, 1]


@pytest.mark.parametrize(
    ("objective", "text", "value"),
    [
        (STSB, "3.8", 3.8),
        (STSB, " 3.85 ", 3.85),  # no target, yet a number: the papers' code takes it
        (STSB, "-7", -7.0),
        (STSB, "very", None),
        (YES_NO, "1 ", 1),
        (YES_NO, "yes", None),
    ],
)
def test_written_answers(objective, text, value):
    assert objective.meaning(text) == value
