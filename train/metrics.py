"""Scores of predictions: accuracy, F1, Matthews, Pearson, Spearman, and their mean, which selects the best epoch.

The numbers come from scikit-learn and scipy. What they leave open is decided as in the LST / SHERL protocol: an answer
that is no label at all (None, NaN, or outside the classes) counts as wrong, one that is no number counts as -1, and a
constant prediction scores 0 where the formula divides by its variance. The libraries are imported where they are used:
half a second, which `predict` does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.store.errors import UserError

INVALID_CLASS = -1
INVALID_VALUE = -1.0  # what an unparsable number counts as: below every STS-B score

Numbers = NDArray[np.float64]


def score(names: Sequence[str], predictions: Any, labels: Any) -> dict[str, float]:
    """Each metric of `names`, and `average`, their mean. Fractions: 1.0 is perfect.

    `predictions`, `labels`: (n,) class indices, or values for pearson and spearman; sequences, arrays or tensors. A
    prediction may be None or NaN (no valid answer). Raises `UserError` for an unknown metric or a missing label,
    `ValueError` for no rows or unequal lengths.
    """
    if not names:
        raise ValueError("no metric named")
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise UserError(f"unknown metric {unknown[0]!r}; metrics: {', '.join(METRICS)}")
    guess, truth = _numbers(predictions), _numbers(labels)
    if len(guess) != len(truth):
        raise ValueError(f"{len(guess)} predictions for {len(truth)} labels")
    if not len(truth):
        raise ValueError("no rows to score")
    if not np.isfinite(truth).all():
        row = int(np.flatnonzero(~np.isfinite(truth))[0])
        raise UserError(f"row {row + 1} has no label, so predictions cannot be scored; score a labelled split")
    values = {name: METRICS[name](guess, truth) for name in names}
    return {**values, "average": sum(values.values()) / len(values)}


def _numbers(values: Any) -> Numbers:
    """(n,) float64, NaN where there is no number."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()  # NumPy has no bfloat16
    return np.asarray([np.nan if v is None else v for v in values], dtype=np.float64)


def _classes(guess: Numbers, truth: Numbers) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    valid = np.isfinite(guess) & (guess >= 0) & (guess == np.floor(guess))
    return np.where(valid, guess, INVALID_CLASS).astype(np.int64), truth.astype(np.int64)


def accuracy(guess: Numbers, truth: Numbers) -> float:
    """Share of rows whose class is right."""
    from sklearn import metrics as sk

    g, t = _classes(guess, truth)
    return float(sk.accuracy_score(t, g))


def f1(guess: Numbers, truth: Numbers) -> float:
    """F1 of class 1 where there are two classes, else the mean over the classes that occur. An answer that is neither
    of two classes is replaced by the wrong one of them, as in the official code."""
    from sklearn import metrics as sk

    g, t = _classes(guess, truth)
    if t.max() <= 1:
        g = np.where((g == 0) | (g == 1), g, 1 - t)
        return float(sk.f1_score(t, g, zero_division=0.0))
    return float(sk.f1_score(t, g, labels=np.unique(t), average="macro", zero_division=0.0))


def matthews(guess: Numbers, truth: Numbers) -> float:
    """Matthews correlation, -1 … 1; 0 where either side is constant. An invalid answer is a class of its own."""
    from sklearn import metrics as sk

    g, t = _classes(guess, truth)
    if _constant(g) or _constant(t):
        return 0.0  # scikit-learn gives the same, after a warning when both are the same constant
    return float(sk.matthews_corrcoef(t, g))


def pearson(guess: Numbers, truth: Numbers) -> float:
    """Pearson's r; 0 where either side is constant or there is one row only."""
    from scipy import stats

    return _correlation(lambda g, t: stats.pearsonr(t, g)[0], guess, truth)


def spearman(guess: Numbers, truth: Numbers) -> float:
    """Spearman's rank correlation; 0 where either side is constant or there is one row only."""
    from scipy import stats

    return _correlation(lambda g, t: stats.spearmanr(t, g)[0], guess, truth)


def _correlation(measure: Callable[[Numbers, Numbers], float], guess: Numbers, truth: Numbers) -> float:
    guess = np.where(np.isfinite(guess), guess, INVALID_VALUE)
    if _constant(guess) or _constant(truth):
        return 0.0
    with np.errstate(all="ignore"):
        value = float(measure(guess, truth))
    return value if np.isfinite(value) else 0.0


def _constant(values: NDArray[Any]) -> bool:
    """True also for values that differ by rounding only, whose correlation would be noise (and a warning of scipy)."""
    spread = float(values.max() - values.min())
    return spread <= 1e-9 * max(1.0, float(np.abs(values).max()))


METRICS: dict[str, Callable[[Numbers, Numbers], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
