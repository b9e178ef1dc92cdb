"""What each weight of a backbone is worth: what LST's pruning chooses by (§3.3)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.batch import Batch
from pipeline.train.baselines.methods import BaselineModel, baseline
from pipeline.train.objectives.base import Objective

FISHER_SAMPLES = 1024


def magnitude(model: nn.Module) -> dict[str, Tensor]:
    """The size of each weight, by parameter name."""
    return {n: p.detach().abs() for n, p in model.named_parameters()}


def fisher(backbone: Backbone, model: nn.Module, objective: Objective, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The empirical Fisher information of each parameter, float32: the sum over `batches`, of one labelled sample each,
    of the squared gradient of the mean token cross entropy on the true target, in eval mode (methods §2.2).

    `model` is left as it was: frozen, without gradients. Parameters that got none count 0.
    """
    whole = BaselineModel(baseline("full"), backbone, model, objective).to(next(model.parameters()).device).eval()
    total = {n: torch.zeros(p.shape, device=p.device) for n, p in model.named_parameters()}
    for batch in batches:
        with torch.enable_grad():
            whole.loss(batch).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad.float().square()
                parameter.grad = None
    model.requires_grad_(False)
    return total
