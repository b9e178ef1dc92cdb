"""Heads from feature maps to logits of classes on the finest map: UPerNet and FCN are transformers' own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import UperNetConfig
from transformers.models import upernet  # it imports its modules when they are asked for

from pipeline.train.objective_configs import SegmentationConfig


class SteadyNorm(nn.BatchNorm2d):
    """Batch norm that takes its running statistics where a channel has a single value, which has no variance: the
    pooled map of one image."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


class LinearHead(nn.Module):
    """A linear map of all maps, brought to the finest one."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(sum(widths), classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[0].shape[-2:]
        same = [maps[0], *(F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps[1:])]
        return self.classifier(torch.cat(same, 1))


def finished(head: Any, dropout: float) -> nn.Module:
    """A head of transformers with what the original has and it lacks: dropout before the classifier (of channels, 0.1
    in UPerNet's code). Fresh weights are drawn as torch draws them. The original draws larger ones for convolutions
    (Kaiming's by outputs) and smaller ones for the classifier (std 0.01), made for 160,000 steps: under batch norm a
    larger weight turns by less in a step, and after six epochs on CamVid no rare class was told yet (validation 0.43
    against 0.52)."""
    for module in list(head.modules()):
        if isinstance(module, upernet.modeling_upernet.UperNetConvModule):
            module.batch_norm = SteadyNorm(module.batch_norm.num_features)
    head.classifier = nn.Sequential(nn.Dropout2d(dropout), head.classifier)
    whole: nn.Module = head
    return whole


def fcn(widths: Sequence[int], classes: int, width: int, dropout: float, convolutions: int) -> nn.Module:
    """`convolutions` of 3 × 3 on the last map but one (the only one where there is but one), then the classifier."""
    config = _config(classes, auxiliary_channels=width, auxiliary_num_convs=convolutions, auxiliary_in_channels=None)
    head = upernet.modeling_upernet.UperNetFCNHead(config, list(widths), in_index=max(0, len(widths) - 2))
    return finished(head, dropout)


def map_head(widths: Sequence[int], classes: int, config: SegmentationConfig) -> nn.Module:
    """The head that `config` asks for, for maps of `widths`, finest first."""
    if config.head == "linear":
        return LinearHead(widths, classes)
    if config.head == "fcn":
        return fcn(widths, classes, config.width, config.dropout, 2)
    pyramid = _config(classes, hidden_size=config.width, pool_scales=[1, 2, 3, 6])
    return finished(upernet.modeling_upernet.UperNetHead(pyramid, list(widths)), config.dropout)


def auxiliary_head(widths: Sequence[int], classes: int, config: SegmentationConfig) -> nn.Module:
    """UPerNet's: one convolution of half the head's width."""
    return fcn(widths, classes, max(1, config.width // 2), config.dropout, 1)


def _config(classes: int, **options: Any) -> Any:
    # The base class takes `num_labels`, which the signature does not say.
    return UperNetConfig(**{"num_labels": classes, **options})
