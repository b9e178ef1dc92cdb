"""Hinge loss with the hardest negatives (Faghri et al., BMVC 2018), as VSE∞ trains with it (methods §9)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pipeline.extract.batch import Batch
from pipeline.train.features import Feature, Features
from pipeline.train.objective_configs import HingeConfig
from pipeline.train.objectives.base import Vocabulary, register_objective
from pipeline.train.objectives.retrieval import Retrieval, RetrievalHead


def hinge(similar: Tensor, alike: Tensor, margin: float, hardest: bool) -> Tensor:
    """Σ over pairs and both directions of [margin + s(negative) − s(pair)]₊, over all negatives or the `hardest` one of
    each pair; a sum, not a mean. `similar`: (B, B), pairs on the diagonal; `alike`: (B, B) bool, no negatives."""
    own = similar.diagonal()
    by_row = (margin + similar - own[:, None]).clamp(min=0).masked_fill(alike, 0)
    by_column = (margin + similar - own[None]).clamp(min=0).masked_fill(alike, 0)
    if hardest:
        return by_row.amax(1).sum() + by_column.amax(0).sum()
    return by_row.sum() + by_column.sum()


class HingeHead(RetrievalHead):
    """With the hardest negatives: in the first epoch every one counts, after it the hardest of each pair; the loss of
    the second epoch is weighed by how much of it has passed, from 0."""

    config: HingeConfig
    hardest, share = False, 1.0

    def begin_step(self, step: int, steps: int, an_epoch: int) -> None:
        if self.config.negatives == "all":
            return
        epoch, place = divmod(step, an_epoch)
        warm = self.config.all_negatives_epochs
        self.hardest = epoch >= warm
        self.share = place / an_epoch if epoch == warm and warm else 1.0

    def losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        similar, alike = self.paired(features, batch)
        return {"hinge": self.share * hinge(similar, alike, self.config.margin, self.hardest)}


@register_objective("hinge", HingeConfig)
class Hinge(Retrieval):
    """See the module's docstring."""

    description = "which of two slots belong together, by a hinge loss with the hardest negatives (VSE∞)"

    def head(self, features: Mapping[str, Feature], vocabulary: Vocabulary) -> HingeHead:
        return HingeHead(features, self.config)
