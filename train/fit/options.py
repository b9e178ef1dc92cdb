"""`FitOptions`: how a tuner is trained. The defaults are those of SHERL and LST on GLUE (methods of the papers)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pipeline.store.errors import UserError
from pipeline.train.fit.reporters import check_reporters
from pipeline.train.fit.schedule import SCHEDULES

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class FitOptions:
    """Options of `fit`, one line each; wrong values raise UserError with the field's name."""

    epochs: int = 20  # passes over the training split
    max_steps: int | None = None  # stop after this many optimizer steps, if fewer than `epochs` gives
    lr: float = 3e-3  # peak learning rate
    weight_decay: float = 0.0  # AdamW's, on parameters with two or more dimensions (not on biases, norms, gates)
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's
    eps: float = 1e-8  # AdamW's
    schedule: str = "linear"  # linear | cosine | constant | rising, after the warm-up
    warmup_steps: int | None = None  # optimizer steps of linear warm-up; or
    warmup_ratio: float | None = None  # the same as a share of all steps; neither: no warm-up
    clip: float | None = 1.0  # largest norm of the gradient; None or 0 switches clipping off
    accumulate: int = 1  # batches whose gradients are averaged into one optimizer step
    precision: str = "float32"  # float32 | bfloat16 | float16 (autocast)
    seed: int = 0  # dropout; the order of samples has its own seed in the source
    patience: int | None = None  # stop after this many evaluations without a better one
    eval_every: int = 1  # epochs between evaluations; the last epoch is always evaluated
    checkpoint_every: int = 500  # optimizer steps between resumable checkpoints; the end of an epoch makes one too
    tensorboard: bool = False  # also write TensorBoard events to the run folder: `report_to` tensorboard
    report_to: tuple[str, ...] = ()  # where else the log goes, see `train.fit.reporters`

    def __post_init__(self) -> None:
        self.betas = (float(self.betas[0]), float(self.betas[1]))
        for name in ("epochs", "accumulate", "eval_every", "checkpoint_every"):
            self._need(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("max_steps", "patience"):
            value = getattr(self, name)
            self._need(name, value is None or value >= 1, "must be at least 1, or left out")
        self._need("lr", math.isfinite(self.lr) and self.lr > 0, "must be a positive number")
        self._need("weight_decay", 0 <= self.weight_decay < math.inf, "must be zero or a positive number")
        self._need("betas", all(0 <= b < 1 for b in self.betas), "must both be in [0, 1)")
        self._need("eps", 0 < self.eps < math.inf, "must be a positive number")
        self._need("schedule", self.schedule in SCHEDULES, f"must be one of {', '.join(SCHEDULES)}")
        self._need("warmup_steps", self.warmup_steps is None or self.warmup_steps >= 0, "must be zero or more")
        self._need("warmup_ratio", self.warmup_ratio is None or 0 <= self.warmup_ratio <= 1, "must be in [0, 1]")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise UserError("warmup_steps and warmup_ratio are both set: give one of them")
        self._need("clip", self.clip is None or 0 <= self.clip < math.inf, "must be zero (off) or a positive number")
        self._need("precision", self.precision in PRECISIONS, f"must be one of {', '.join(PRECISIONS)}")
        check_reporters(self.reporters)
        self._need("seed", 0 <= self.seed < 2**63, "must be zero or a positive integer")

    @property
    def reporters(self) -> tuple[str, ...]:
        """Where else the log goes."""
        return (*self.report_to, *(["tensorboard"] if self.tensorboard and "tensorboard" not in self.report_to else []))

    def _need(self, name: str, right: bool, rule: str) -> None:
        if not right:
            raise UserError(f"{name} {rule}, got {getattr(self, name)!r}")

    def steps(self, batches: int) -> int:
        """Optimizer steps of the whole run over epochs of `batches` batches."""
        total = self.epochs * -(-batches // self.accumulate)
        return total if self.max_steps is None else min(total, self.max_steps)

    def warmup(self, steps: int) -> int:
        """Warm-up in optimizer steps of a run of `steps`; it may be longer than the run (LST's 500 steps on RTE)."""
        if self.warmup_ratio is not None:
            return math.ceil(self.warmup_ratio * steps)
        return self.warmup_steps or 0
