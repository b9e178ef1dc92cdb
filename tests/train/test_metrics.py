"""Scores against scikit-learn and scipy, and what is defined where they warn or divide by zero."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from pipeline.store.errors import UserError
from pipeline.train.metrics import CLASSES, ERRORS, METRICS, score


@pytest.fixture(autouse=True)
def no_warnings() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_against_the_libraries() -> None:
    r = np.random.default_rng(0)
    truth, guess = r.integers(0, 2, 200), r.integers(0, 2, 200)
    got = score(("accuracy", "f1", "matthews"), torch.tensor(guess), truth.tolist())
    assert got["accuracy"] == (truth == guess).mean()
    assert got["f1"] == sk.f1_score(truth, guess)
    assert got["matthews"] == sk.matthews_corrcoef(truth, guess)
    assert got["average"] == pytest.approx(np.mean([got["accuracy"], got["f1"], got["matthews"]]))
    values, other = r.normal(size=200), r.normal(size=200)
    got = score(("pearson", "spearman"), other, values)
    assert got["pearson"] == pytest.approx(stats.pearsonr(values, other)[0])
    assert got["spearman"] == pytest.approx(stats.spearmanr(values, other)[0])


def test_known_values() -> None:
    # tp 2, fp 1, fn 1, tn 2: F1 = 4 / 6, Matthews = (4 - 1) / 9
    got = score(("f1", "matthews"), [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0])
    assert got["f1"] == pytest.approx(2 / 3) and got["matthews"] == pytest.approx(1 / 3)
    assert score(("f1",), [0, 1, 2, 2], [0, 1, 2, 1])["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_invalid_answers_count_as_wrong() -> None:
    truth = [1, 0, 1, 0]
    for invalid in (None, float("nan"), -1, 7, 0.5):
        got = score(("accuracy", "f1", "matthews"), [1, 0, invalid, invalid], truth)
        assert got["accuracy"] == 0.5
        assert got["f1"] == pytest.approx(sk.f1_score(truth, [1, 0, 0, 1]))
        assert got["matthews"] == pytest.approx(sk.matthews_corrcoef(truth, [1, 0, -1, -1]))
    got = score(("pearson",), [1.0, None, 3.0], [1.0, 2.0, 3.0])
    assert got["pearson"] == pytest.approx(stats.pearsonr([1, 2, 3], [1, -1, 3])[0])


@pytest.mark.parametrize(("guess", "f1"), [([1] * 4, 2 / 3), ([0] * 4, 0.0), ([None] * 4, 0.0)])
def test_constant_predictions_are_defined(guess: list[int | None], f1: float) -> None:
    got = score(("matthews", "pearson", "spearman"), guess, [1, 0, 0, 1])
    assert set(got.values()) == {0.0}
    assert score(("f1",), guess, [1, 0, 0, 1])["f1"] == pytest.approx(f1)


def test_constant_labels_and_single_rows_are_defined() -> None:
    for labels in ([1, 1, 1], [0, 0, 0]):
        got = score(tuple(METRICS), [1, 0, 1], labels)
        assert got["matthews"] == got["pearson"] == got["spearman"] == 0.0 and np.isfinite(got["average"])
    assert score(tuple(METRICS), [1], [1])["accuracy"] == 1.0
    assert score(("pearson",), [1.0, 1.0 + 1e-12, 1.0], [0.0, 1.0, 2.0])["pearson"] == 0.0


def test_bfloat16_tensors() -> None:
    assert score(("pearson",), torch.tensor([1, 2, 3], dtype=torch.bfloat16), [1, 2, 3])["average"] == pytest.approx(1)


def test_bad_calls() -> None:
    with pytest.raises(UserError, match="unknown metric 'auc'; metrics: accuracy, balanced_accuracy, f1"):
        score(("auc",), [1], [1])
    with pytest.raises(UserError, match="row 2 has no label"):
        score(("accuracy",), [1, 1], [1, None])
    with pytest.raises(ValueError, match="2 predictions for 1 labels"):
        score(("accuracy",), [1, 1], [1])
    with pytest.raises(ValueError, match="no rows"):
        score(("accuracy",), [], [])
    with pytest.raises(ValueError, match="no metric"):
        score((), [1], [1])
    one, three = np.ones(1), np.ones(3)
    for measure in CLASSES.values():  # arrays that numpy would broadcast, or take the mean of nothing
        with pytest.raises(ValueError, match="1 predictions for 3 labels"):
            measure(one, three)
        with pytest.raises(ValueError, match="no rows to score"):
            measure(one[:0], three[:0])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([None, -1.0, 0.0, 1.0, 2.0, 0.3]), st.integers(0, 2)), min_size=1))
def test_always_finite_and_in_range(rows: list[tuple[float | None, int]]) -> None:
    got = score(tuple(METRICS), [g for g, _ in rows], [t for _, t in rows])
    open_ended = {*ERRORS, "r2", "average"}
    assert all(np.isfinite(v) and (name in open_ended or -1 <= v <= 1.0000001) for name, v in got.items())
