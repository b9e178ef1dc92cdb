"""Scores of predictions by the names that scikit-learn gives them, and their mean, which selects the best epoch.

The numbers come from scikit-learn and scipy. CLASSES read a class a row, NUMBERS a number, RANKED the probability of
each class, LABELS several labels a row; of ERRORS the smallest is the best. What the libraries leave open is decided as
in the LST / SHERL protocol: an answer that is no label at all (None, NaN, or outside the classes) counts as wrong, one
that is no number counts as -1, and a constant prediction scores 0 where the formula divides by its variance.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.store.errors import Notice, UserError


class _Late:
    """A library's functions; it is imported when the first is called: half a second that `predict` does without."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **options: getattr(import_module(self._module), name)(*args, **options)


sk, stats = _Late("sklearn.metrics"), _Late("scipy.stats")

INVALID_CLASS = -1
INVALID_VALUE = -1.0  # what an unparsable number counts as: below every STS-B score

Numbers = NDArray[np.float64]
Classes = NDArray[np.int64]
Chances = NDArray[np.float32]


def score(
    names: Sequence[str], predictions: Any, labels: Any, chances: Any = None, average: bool = True
) -> dict[str, float]:
    """Each metric of `names`, and with `average` their mean under that name. But for errors, 1.0 is perfect; NaN is
    undefined.

    `predictions`, `labels`: (n,) class indices, or values for metrics of numbers; sequences, arrays or tensors. A
    prediction may be None or NaN (no valid answer). `chances` (n, classes): what metrics of RANKED read. Raises
    `UserError` for an unknown metric or a missing label, `ValueError` for no rows or unequal lengths.
    """
    if not names:
        raise ValueError("no metric named")
    ranked = RANKED if chances is not None else {}
    unknown = [name for name in names if name not in METRICS and name not in ranked]
    if unknown:
        raise UserError(f"unknown metric {unknown[0]!r}; metrics: {', '.join(METRICS)}")
    guess, truth = _numbers(predictions), _numbers(labels)
    _refuse_lengths(guess, truth)
    if not np.isfinite(truth).all():
        row = int(np.flatnonzero(~np.isfinite(truth))[0])
        raise UserError(f"row {row + 1} has no label, so predictions cannot be scored; score a labelled split")
    values = {
        name: ranked[name](chances, truth.astype(np.int64)) if name in ranked else METRICS[name](guess, truth)
        for name in names
    }
    return {**values, "average": sum(values.values()) / len(values)} if average else values


def _numbers(values: Any) -> Numbers:
    """(n,) float64, NaN where there is no number."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()  # NumPy has no bfloat16
    return np.asarray([np.nan if v is None else v for v in values], dtype=np.float64)


def _refuse_lengths(guess: Numbers, truth: Numbers) -> None:
    if len(guess) != len(truth):
        raise ValueError(f"{len(guess)} predictions for {len(truth)} labels")
    if not len(truth):
        raise ValueError("no rows to score")


def _classes(guess: Numbers, truth: Numbers) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    _refuse_lengths(guess, truth)
    valid = np.isfinite(guess) & (guess >= 0) & (guess == np.floor(guess))
    return np.where(valid, guess, INVALID_CLASS).astype(np.int64), truth.astype(np.int64)


def accuracy(guess: Numbers, truth: Numbers) -> float:
    """Share of rows whose class is right."""
    g, t = _classes(guess, truth)
    return float(np.mean(t == g))  # scikit-learn's import would be half a second of every small run


def f1(guess: Numbers, truth: Numbers) -> float:
    """F1 of class 1 where there are two classes, else the mean over the classes that occur. An answer that is neither
    of two classes is replaced by the wrong one of them, as in the official code."""
    return _of_classes(sk.f1_score, guess, truth)


def precision(guess: Numbers, truth: Numbers) -> float:
    """Of class 1 or the mean, as for `f1`."""
    return _of_classes(sk.precision_score, guess, truth)


def recall(guess: Numbers, truth: Numbers) -> float:
    """Of class 1 or the mean, as for `f1`."""
    return _of_classes(sk.recall_score, guess, truth)


def _of_classes(measure: Callable[..., Any], guess: Numbers, truth: Numbers) -> float:
    g, t = _classes(guess, truth)
    if t.max() <= 1:
        g = np.where((g == 0) | (g == 1), g, 1 - t)
        return float(measure(t, g, zero_division=0.0))
    return float(measure(t, g, labels=np.unique(t), average="macro", zero_division=0.0))


def _averaged(measure: Callable[..., Any], average: str) -> Callable[[Numbers, Numbers], float]:
    """`measure` over the classes that are there or told; an answer that is no class is one of its own."""

    def inner(guess: Numbers, truth: Numbers) -> float:
        g, t = _classes(guess, truth)
        return float(measure(t, g, average=average, zero_division=0.0))

    return inner


def balanced_accuracy(guess: Numbers, truth: Numbers) -> float:
    """The mean over the classes that occur of the share of their rows whose class is right."""
    g, t = _classes(guess, truth)
    return float(sk.recall_score(t, g, labels=np.unique(t), average="macro", zero_division=0.0))


def cohen_kappa(guess: Numbers, truth: Numbers) -> float:
    """Agreement beyond chance; 0 where there is nothing beside chance."""
    g, t = _classes(guess, truth)
    return 0.0 if _constant(g) and _constant(t) else float(sk.cohen_kappa_score(t, g))


def matthews(guess: Numbers, truth: Numbers) -> float:
    """Matthews correlation, -1 … 1; 0 where either side is constant. An invalid answer is a class of its own."""
    g, t = _classes(guess, truth)
    if _constant(g) or _constant(t):
        return 0.0  # scikit-learn gives the same, after a warning when both are the same constant
    return float(sk.matthews_corrcoef(t, g))


def pearson(guess: Numbers, truth: Numbers) -> float:
    """Pearson's r; 0 where either side is constant or there is one row only."""
    return _correlation(lambda g, t: stats.pearsonr(t, g)[0], guess, truth)


def spearman(guess: Numbers, truth: Numbers) -> float:
    """Spearman's rank correlation; 0 where either side is constant or there is one row only."""
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


def _valued(measure: Callable[..., Any]) -> Callable[[Numbers, Numbers], float]:
    return lambda guess, truth: float(measure(truth, np.where(np.isfinite(guess), guess, INVALID_VALUE)))


def r2(guess: Numbers, truth: Numbers) -> float:
    """The share of the variance that is explained; 0 where there is one row only."""
    return 0.0 if len(truth) < 2 else _valued(sk.r2_score)(guess, truth)


def roc_auc(chances: Chances, truth: Classes) -> float:
    """Area under the curve of class 1 where there are two classes, else the mean over classes, each beside all others;
    only classes that some rows have and some have not count, NaN where there is none."""
    return _one_to_rest(sk.roc_auc_score, chances, truth)


def average_precision(chances: Chances, truth: Classes) -> float:
    """Area under precision and recall, of class 1 or the mean as for `roc_auc`."""
    return _one_to_rest(sk.average_precision_score, chances, truth)


def _one_to_rest(measure: Callable[..., Any], chances: Chances, truth: Classes) -> float:
    there = truth[:, None] == np.arange(chances.shape[1])[None, :]
    if chances.shape[1] == 2:
        chances, there = chances[:, 1:], there[:, 1:]
    return over_labels(measure, there, chances)


def over_labels(measure: Callable[..., Any], there: NDArray[np.bool_], chances: Chances) -> float:
    """The mean of `measure` over the columns of `there` (n, labels) that have both rows with and without; NaN, and a
    Notice, where there is none."""
    both = there.any(0) & ~there.all(0)
    found = [measure(there[:, i], chances[:, i]) for i in np.flatnonzero(both)]
    if not found:
        what = "a metric that ranks rows is undefined: of each class there are all of these rows or none"
        warnings.warn(what, Notice, stacklevel=2)
    return float(np.mean(found)) if found else math.nan


def mean_precision(there: NDArray[np.bool_], chances: Chances) -> float:
    """Average precision, the mean over labels that some row has; 0 where none has one."""
    found = there.any(0)
    measure = sk.average_precision_score
    return float(measure(there[:, found], chances[:, found], average="macro")) if found.any() else 0.0


def _several(measure: Callable[..., Any], average: str) -> Callable[..., float]:
    return lambda there, told, chances: float(measure(there, told, average=average, zero_division=0.0))


CLASSES: dict[str, Callable[[Numbers, Numbers], float]] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "f1": f1,
    "precision": precision,
    "recall": recall,
    "f1_macro": _averaged(sk.f1_score, "macro"),
    "f1_micro": _averaged(sk.f1_score, "micro"),
    "f1_weighted": _averaged(sk.f1_score, "weighted"),
    "precision_macro": _averaged(sk.precision_score, "macro"),
    "recall_macro": _averaged(sk.recall_score, "macro"),
    "matthews": matthews,
    "cohen_kappa": cohen_kappa,
}
NUMBERS: dict[str, Callable[[Numbers, Numbers], float]] = {
    "pearson": pearson,
    "spearman": spearman,
    "r2": r2,
    "mse": _valued(sk.mean_squared_error),
    "rmse": _valued(sk.root_mean_squared_error),
    "mae": _valued(sk.mean_absolute_error),
}
METRICS = CLASSES | NUMBERS
RANKED: dict[str, Callable[[Chances, Classes], float]] = {"roc_auc": roc_auc, "average_precision": average_precision}
# Of rows with several labels: (n, labels) whether they are there, are told, and their probabilities.
LABELS: dict[str, Callable[..., float]] = {
    "micro_f1": _several(sk.f1_score, "micro"),
    "macro_f1": _several(sk.f1_score, "macro"),
    "map": lambda there, told, chances: mean_precision(there, chances),
    "f1_micro": _several(sk.f1_score, "micro"),
    "f1_macro": _several(sk.f1_score, "macro"),
    "f1_weighted": _several(sk.f1_score, "weighted"),
    "f1_samples": _several(sk.f1_score, "samples"),
    "precision_micro": _several(sk.precision_score, "micro"),
    "precision_macro": _several(sk.precision_score, "macro"),
    "recall_micro": _several(sk.recall_score, "micro"),
    "recall_macro": _several(sk.recall_score, "macro"),
    "accuracy": lambda there, told, chances: float(sk.accuracy_score(there, told)),
    "hamming_loss": lambda there, told, chances: float(sk.hamming_loss(there, told)),
    "roc_auc": lambda there, told, chances: over_labels(sk.roc_auc_score, there, chances),
    "average_precision": lambda there, told, chances: mean_precision(there, chances),
}
OF_TWO = ("f1", "precision", "recall")  # metrics of CLASSES that look at one class of two
ERRORS = ("mse", "rmse", "mae", "hamming_loss", "loss", "perplexity")  # figures of tokens too
_RANKED = re.compile(r"(\w+_r\d+|(fold_)?rsum|\w+_median)")  # of retrieval: per cent already, their sum, and ranks


def smaller_is_better(name: str) -> bool:
    """Whether the best value of a figure is its smallest; of one of several tasks, "lengths.mse", too."""
    own = re.split(r"[ .]", name)[-1]
    return own in ERRORS or own.endswith("_median")


def is_share(name: str) -> bool:
    """Whether a figure is a share from 0 to 1, which is told in per cent; names as of `smaller_is_better`."""
    own = re.split(r"[ .]", name)[-1]
    return own not in ERRORS and not _RANKED.fullmatch(own)
