"""What a backbone can do beyond being run: each capability is a class to inherit from beside `Backbone`.

A backbone without one does not inherit it, and says so by that alone. What a tuner needs stands in `Tuner.needs`; the
door then says which of it a backbone has not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from pipeline.extract.backbones.fill import check_fit
from pipeline.extract.backbones.loading import freeze
from pipeline.extract.backbones.tail import LiveTail, TextTail
from pipeline.extract.completion import answer_ids
from pipeline.extract.inputs import Inputs

if TYPE_CHECKING:
    from pipeline.extract.backbones.base import TextOptions
    from pipeline.extract.batch import Batch


class Capability(ABC):
    """`what`: completes the sentence "it needs …"."""

    what: ClassVar[str]
    streams: ClassVar[tuple[str, ...]]


class Blocks(Capability):
    """Its blocks can be had from the loaded backbone, for methods that put something into them."""

    what = "a list of blocks"

    @abstractmethod
    def stack(self, model: Any, stream: str) -> Sequence[nn.Module]:
        """The blocks of `stream` of a loaded backbone, in order."""

    def finish(self, model: Any, rows: Tensor) -> Tensor:
        """The loaded backbone's own final norm on the rows of its last state; nothing where it has none."""
        return rows


class LiveLast(Capability):
    """Its last block can be run live on what a tuner makes, from weights kept in the store."""

    what = "a last block that can be run live"

    @abstractmethod
    def tail_weights(self, model: Any) -> dict[str, Tensor]:
        """What `tail` needs, from a loaded backbone; float32 on the host."""

    @abstractmethod
    def tail(self, weights: dict[str, Tensor] | None, attention: str) -> LiveTail:
        """The tail from `weights` alone; None gives the shape only (for counting, on the meta device)."""

    @abstractmethod
    def norm(self, stream: str) -> nn.Module:
        """A fresh trainable norm of the kind the backbone puts after its last block; Identity where it has none."""


class LateBlocks(Blocks, LiveLast):
    """Blocks before the last one can be live too: those of the last stream are alike."""

    what = "blocks before the last that can be run live"

    @abstractmethod
    def bare_block(self, attention: str) -> nn.Module:
        """A block like those before the last of the last stream, with arbitrary weights or on the meta device."""

    def block_weights(self, model: Any, index: int) -> dict[str, Tensor]:
        """The weights of block `index` of the last stream, float32 on the host."""
        block = self.stack(model, self.streams[-1])[index]
        return {k: v.detach().float().cpu().contiguous() for k, v in block.state_dict().items()}

    def late_block(self, weights: dict[str, Tensor] | None, attention: str) -> nn.Module:
        """A live block from what `block_weights` gave; None gives the shape only."""
        block = self.bare_block(attention)
        if weights is not None:
            check_fit(block.state_dict(), weights)
            if next(block.parameters()).is_meta:
                block = block.to_empty(device="cpu")
            block.load_state_dict(weights)
        return freeze(block)


class LanguageHead(LiveLast):
    """It has a language-model head, which stays frozen."""

    what = "a language-model head"

    @abstractmethod
    def tail(self, weights: dict[str, Tensor] | None, attention: str) -> TextTail: ...

    @abstractmethod
    def logits(self, model: Any, rows: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The loaded backbone's own language-model head, as `TextTail.logits`."""


class Answers(LanguageHead):
    """It can be asked with a text and answer with one of several target texts, which its head knows the tokens of."""

    what = "a language-model head that answers"

    @abstractmethod
    def candidates(self, tokenizer: Any, targets: Sequence[str]) -> list[list[int]]:
        """Token ids of each target text."""

    @abstractmethod
    def prepare(
        self,
        tokenizer: Any,
        texts: Sequence[Sequence[str]],
        options: TextOptions,
        candidates: Sequence[Sequence[int]] = (),
        gold: Sequence[int] | None = None,
    ) -> Inputs:
        """As `Backbone.prepare`, with positions for the answer. `candidates`: token ids of each target; `gold`: the
        index of each sample's own target when its states are for training, None when they are for scoring."""


class ContinuesText(Answers):
    """It is a decoder alone, of one stream: the row at a position predicts the token after it. It answers by going on
    with the text, where it is asked to."""

    what = "a decoder that goes on with a text"

    def candidates(self, tokenizer: Any, targets: Sequence[str]) -> list[list[int]]:
        return answer_ids(tokenizer, targets)


class WritesText(Answers):
    """It has a decoder, fed texts that stand among the inputs, and a frozen language-model head."""

    what = "a decoder that writes text"

    @property
    @abstractmethod
    def start_id(self) -> int:
        """The id every decoder input begins with."""

    @abstractmethod
    def with_decoder(self, inputs: Inputs, chains: Sequence[Sequence[int]]) -> Inputs:
        """`inputs` with the decoder positions replaced by the given input ids, one chain a sample (free generation)."""

    def keep_tokens(self, model: Any, tokens: int) -> None:
        """Cut from a loaded backbone the rows of its tables from `tokens` on, the number of ids its tokenizer has."""


class ClassToken(Capability):
    """One row of each sample is a token that the backbone was trained to describe the whole of it by: row 0, unless
    `class_rows` says another."""

    what = "a class token that stands for an image"

    @property
    def projected_width(self) -> int | None:
        """The width of CLIP's joint space, into which its tail projects that token; None where there is none."""
        return None

    def class_rows(self, batch: Batch) -> Tensor:
        """(B,) int64, the row of each sample's token."""
        return batch.layout("encoder").first


class Patches(LiveLast):
    """In one stream whose last rows are patches on a grid, `Backbone.extra_rows` others before them; its tail has the
    norm after the last block."""

    what = "patches on a grid"


class Levels(Capability):
    """In stages, the last states of some of which make up a feature pyramid."""

    what = "a feature pyramid"

    @property
    @abstractmethod
    def levels(self) -> tuple[str, ...]:
        """The streams of the feature pyramid, the finest map first."""

    @abstractmethod
    def after_levels(self, model: Any) -> Sequence[nn.Module]:
        """Modules of a loaded backbone that come after the last level: the pyramid does not depend on them."""


class Branches(LiveLast):
    """In stages, with states of their own for what attention and MLP of each block add to the stream (`stage2.3.msa`,
    `stage2.3.mlp`) and for the patch embedding (`stage1.in`), and mergings between stages that its tail keeps."""

    what = "states of its attention and MLP branches"

    @abstractmethod
    def branches(self, model: Any) -> list[tuple[int, Sequence[nn.Module]]]:
        """The width of each block of a loaded backbone, and the modules that end its branches."""
