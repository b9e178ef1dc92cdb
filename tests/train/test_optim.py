"""The optimizer's step is that of the papers' library, written out here."""

from __future__ import annotations

import math

import torch
from torch import nn

from pipeline.train.fit.optimizer import adamw
from pipeline.train.fit.options import FitOptions
from pipeline.train.fit.run_files import load_optimizer_state, optimizer_state

OPTIONS = FitOptions(lr=0.1, eps=1e-2, betas=(0.9, 0.99))


def gradients(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return {n: 0.01 * torch.randn(p.shape, generator=g) for n, p in model.named_parameters()}


def test_epsilon_is_added_before_the_bias_correction_also_after_a_resume():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    m = {n: torch.zeros_like(w) for n, w in weights.items()}
    v = {n: torch.zeros_like(w) for n, w in weights.items()}
    optimizer, names = adamw(model, OPTIONS)
    for t in range(1, 6):
        if t == 4:
            saved = optimizer_state(optimizer, names)
            optimizer, names = adamw(model, OPTIONS)
            load_optimizer_state(optimizer, names, saved)
        for name, grad in gradients(model, t).items():
            dict(model.named_parameters())[name].grad = grad
            m[name] = 0.9 * m[name] + 0.1 * grad
            v[name] = 0.99 * v[name] + 0.01 * grad**2
            size = 0.1 * math.sqrt(1 - 0.99**t) / (1 - 0.9**t)
            weights[name] -= size * m[name] / (v[name].sqrt() + 1e-2)
        optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach().double(), weights[name], rtol=1e-5, atol=1e-7)
    assert all(group["eps"] == 1e-2 for group in optimizer.param_groups)
