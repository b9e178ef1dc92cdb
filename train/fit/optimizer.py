"""The optimizer of a tuner, and the random numbers of a step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.store.errors import UserError
from pipeline.train.fit.options import FitOptions


class AdamW(torch.optim.AdamW):
    """AdamW with eps outside the bias correction, as in the library of the papers' runs (transformers 4.6): a step is
    lr · √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + eps). torch corrects v before it adds eps, and does the same with
    eps / √(1 − β₂ᵗ). At β₂ = 0.999 eps counts 32 times as much in the first step."""

    def step(self, closure: Any = None) -> Any:
        given = [group["eps"] for group in self.param_groups]
        for group, eps in zip(self.param_groups, given, strict=True):
            # All parameters of a run have a gradient in every step, so any of them knows how many were made.
            made = next((int(self.state[p]["step"]) for p in group["params"] if self.state.get(p)), 0)
            group["eps"] = eps / math.sqrt(1 - group["betas"][1] ** (made + 1))
        try:
            return super().step(closure)
        finally:
            for group, eps in zip(self.param_groups, given, strict=True):
                group["eps"] = eps


def adamw(model: nn.Module, options: FitOptions) -> tuple[AdamW, list[str]]:
    """AdamW over the trainable parameters, and their names in the order of its groups.

    Biases, norms and gates (fewer than two dimensions) are not decayed, as everywhere in the field. Raises UserError
    if nothing is trainable.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise UserError("the model has no trainable parameters")
    decayed = [name for name, p in parameters.items() if p.ndim >= 2]
    others = [name for name, p in parameters.items() if p.ndim < 2]
    groups = [
        {"params": [parameters[n] for n in names], "weight_decay": decay, "initial_lr": options.lr}
        for names, decay in ((decayed, options.weight_decay), (others, 0.0))
        if names
    ]
    return AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps), decayed + others


def seed_of(seed: int, step: int) -> int:
    """What one step's random numbers are seeded with, unrelated to its neighbours'."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def reseed(seed: int, step: int, device: torch.device) -> None:
    """Seed the random numbers of one step, see `seed_of`."""
    value = seed_of(seed, step)
    # torch.manual_seed also queues a call, with a stack trace, for each kind of device that is not in use.
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(value)
