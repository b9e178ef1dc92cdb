"""The frozen end of a backbone that stays beside a tuner, made from weights in the store, the rest being absent."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from pipeline.extract.batch import Batch
from pipeline.store.errors import UserError


class Tail(nn.Module):
    """What a tuner may ask of every backbone. As it is here: of one that stores its embedding output and normalises
    nothing after its last block."""

    def embed(self, batch: Batch, stream: str) -> Tensor:
        """The backbone's embedding output (rows, width): the stored state `<stream>.embed`, or looked up from ids."""
        return batch.states[f"{stream}.embed"]

    def final_norm(self, rows: Tensor, stream: str) -> Tensor:
        """The backbone's own frozen norm after the last block of `stream`; the identity where it has none."""
        return rows

    def projected(self, rows: Tensor) -> Tensor:
        """The class tokens' rows in the joint space of a CLIP, which alone has one (see `ClassToken`)."""
        raise UserError(
            "the store keeps no projection into CLIP's joint space: it was extracted by an earlier version, or from a "
            "checkpoint without one; extract into a new store"
        )


class LiveTail(Tail, ABC):
    """The frozen live end: gradients flow through it, its weights never change.

    `forward(hidden, batch)` runs the live last block. `hidden`: stream → (rows, width); the last stream's rows enter
    the block, those of earlier streams are what it attends to. Returns (rows of the last stream, width).

    `late`: further live blocks before the last, by their number, where a tuner asks for them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.ModuleDict()

    @property
    @abstractmethod
    def last(self) -> nn.Module:
        """The live last block."""

    @abstractmethod
    def through(self, block: nn.Module, hidden: dict[str, Tensor], batch: Batch) -> Tensor:
        """`forward` with `block`, a block of the same kind, in place of the last."""

    def forward(self, hidden: dict[str, Tensor], batch: Batch) -> Tensor:
        return self.through(self.last, hidden, batch)


class TextTail(LiveTail):
    """The live end of a backbone that writes text."""

    @abstractmethod
    def logits(self, rows: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Frozen language-model head: (rows, width) → (rows, vocabulary), or only the columns `tokens`."""
