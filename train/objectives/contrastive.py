"""Symmetric cross entropy over a batch's similarities: CLIP's loss (Radford et al., ICML 2021), and CLIP4Clip's."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.extract.batch import Batch
from pipeline.train.features import Feature, Features
from pipeline.train.objective_configs import ContrastiveConfig
from pipeline.train.objectives.base import Vocabulary, register_objective
from pipeline.train.objectives.retrieval import Retrieval, RetrievalHead

LARGEST = math.log(100)  # of the logarithm of the scale, as in CLIP


def symmetric(similar: Tensor, alike: Tensor, log_scale: Tensor) -> Tensor:
    """The mean of both cross entropies of exp(`log_scale`) · `similar` (B, B), whose pairs are on the diagonal; what is
    `alike` beside them, (B, B) bool, is no negative."""
    own = torch.arange(len(similar), device=similar.device)
    logits = log_scale.clamp(max=LARGEST).exp() * similar
    logits = logits.masked_fill(alike & ~torch.eye(len(own), dtype=torch.bool, device=own.device), -torch.inf)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2


class ContrastiveHead(RetrievalHead):
    """Adds the logarithm of what similarities are multiplied by: a parameter, or fixed."""

    log_scale: Tensor

    def __init__(self, features: Mapping[str, Feature], config: ContrastiveConfig) -> None:
        super().__init__(features, config)
        start = torch.tensor(math.log(config.logit_scale))
        if config.learn_scale:
            self.log_scale = nn.Parameter(start)
        else:
            self.register_buffer("log_scale", start, persistent=False)  # a run's recipe has it

    def losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        similar, alike = self.paired(features, batch)
        return {"contrastive": symmetric(similar, alike, self.log_scale)}


@register_objective("contrastive", ContrastiveConfig)
class Contrastive(Retrieval):
    """See the module's docstring."""

    description = "which of two slots belong together, by symmetric cross entropy over the batch (CLIP, CLIP4Clip)"

    def head(self, features: Mapping[str, Feature], vocabulary: Vocabulary) -> ContrastiveHead:
        return ContrastiveHead(features, self.config)
