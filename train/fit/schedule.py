"""Learning-rate schedules as a factor of the peak rate; the formulas of Hugging Face's `get_*_schedule_with_warmup`,
and one that rises evenly in its logarithm from a hundred-thousandth of the peak, for a range test."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def _linear(done: float) -> float:
    return 1.0 - done


def _cosine(done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _constant(done: float) -> float:
    return 1.0


def _drop(done: float) -> float:
    return 1.0 if done < 0.6 else 0.1  # VSE∞: at epoch 15 of 25


def _rising(done: float) -> float:
    return 10.0 ** (5.0 * (done - 1.0))


# name → factor at the share `done` in [0, 1] of the steps after the warm-up
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "drop": _drop,
    "rising": _rising,
}


def factor(schedule: str, warmup: int, total: int) -> Callable[[int], float]:
    """step (from 0) → factor of the peak rate: up from 0 over `warmup` steps, then by `schedule` until `total`."""
    after = SCHEDULES[schedule]

    def at(step: int) -> float:
        if step < warmup:
            return step / warmup
        return after(min(1.0, (step - warmup) / max(1, total - warmup)))

    return at


def scheduler(optimizer: Optimizer, schedule: str, warmup: int, total: int, step: int = 0) -> LambdaLR:
    """A scheduler that has already made `step` steps; the optimizer's groups must hold `initial_lr` if step > 0."""
    return LambdaLR(optimizer, factor(schedule, warmup, total), last_epoch=step - 1)
