"""What a backbone is: one architecture at one shape, known from a checkpoint's `config.json` alone.

A `Backbone` says which hidden states there are and how wide they are, turns samples into `Inputs`, and runs the frozen
model and collects states. That is enough for tuners that read states (a probe, LST, UniPT, Head2Toe). What else it can
do (a live last block, writing text, …) is a capability beside it: `extract.backbones.capabilities`. It knows nothing of
tuners, and no training default. Adding a backbone means adding one file with one subclass under `@register_backbone`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.extract.backbones.capabilities import ContinuesText, WritesText
from pipeline.extract.backbones.tail import Tail
from pipeline.extract.batch import Batch, stream_of
from pipeline.extract.completion import Form
from pipeline.extract.inputs import Inputs
from pipeline.extract.projection import Projection


@dataclass(frozen=True)
class TextOptions:
    """How text becomes input ids. `prompt`: what a family that answers with text is asked with; "" elsewhere. `words`:
    also find out which word each position belongs to, which changes nothing else. `form`: what the rows of a completion
    task are, see `extract.completion`; "plain" for those of any other. `stride`: longer texts of such a task become
    windows that begin so many tokens apart; None: they are cut.

    Of image families: `root`, the folder that file names are relative to; `skip_bad`, leave out images that cannot be
    read; `image_size`, "HEIGHTxWIDTH" of what the backbone sees, "own" for each
    image's own, "short:SIDE:LONGEST" for that at a size, "" for the checkpoint's; `views`, how many fixed
    augmented views of a training image there are (1: the plain one alone), `augment`, how they are made ("random",
    "flip"), and `view_seed`, which draws random ones;
    `upright`, turn images as their EXIF orientation says (False: of spaces made before that was done); `dense`, show
    the whole of each image, padded at the bottom and the right to the backbone's coarsest stride, and keep as meta
    where it shows what; `frames`, names are of videos, of each of which at most so many frames are shown (0: of
    images).
    """

    prompt: str = ""
    max_length: int = 128
    truncation_side: Literal["left", "right"] = "right"
    root: str = ""
    skip_bad: bool = False
    image_size: str = ""
    views: int = 1
    augment: str = "random"
    view_seed: int = 0
    upright: bool = True
    dense: bool = False
    frames: int = 0
    words: bool = False
    form: Form = "plain"
    stride: int | None = None


class Backbone(ABC):
    """One architecture at one shape. `config` is the checkpoint's Hugging Face configuration.

    To be written: the class attributes without a value, `width`, `depth`, `prepare`, `load` and `run`.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    description: ClassVar[str]
    streams: ClassVar[tuple[str, ...]]
    causal: ClassVar[tuple[str, ...]] = ()  # streams whose positions see only those before them
    attentions: ClassVar[tuple[str, ...]] = ("sdpa", "eager")
    modality: ClassVar[Literal["text", "image"]] = "text"
    # "sequence": every stream has one width and a block's output keeps its positions. "pyramid": a stream a stage, each
    # coarser and wider than the one before; the last stage's last block is the live one.
    shape: ClassVar[Literal["sequence", "pyramid"]] = "sequence"
    timm_names: ClassVar[tuple[str, ...]] = ()  # beginnings of timm architecture names
    extra_rows: int = 0  # of a sample before those of its map: class, distillation and register tokens

    def __init__(self, config: Any) -> None:
        self.config = config
        self._projection: Projection | None = None

    # -- what a feature space is made with where nothing is said; of attention, the first of `attentions` ----------
    @property
    def usual_precision(self) -> str:
        return "float32"

    @property
    def usual_length(self) -> int:
        return 128

    # -- shape ---------------------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def width(self) -> int:
        """The width of the last stream's states."""

    @abstractmethod
    def depth(self, stream: str) -> int:
        """Number of blocks of `stream`."""

    @property
    def heads(self) -> int:
        """Attention heads of a block; one for each 64 channels where the configuration does not say."""
        return getattr(self.config, "num_attention_heads", None) or max(1, self.width // 64)

    @property
    def writes_text(self) -> bool:
        """Whether it answers a text: an encoder, a decoder and a language-model head."""
        return isinstance(self, WritesText)

    @property
    def continues_text(self) -> bool:
        """Whether it goes on with a text: a decoder alone and a language-model head."""
        return isinstance(self, ContinuesText)

    def states(self) -> list[str]:
        """Every state that can be collected: of each stream the embedding output, where it is one, and the output of
        each block."""
        return [n for s in self.streams for n in (*self.embedding(s), *(f"{s}.{i}" for i in range(self.depth(s))))]

    def made_states(self) -> list[str]:
        """States beside `states` that are made of these where they would be larger, for tuners that ask for them."""
        return []

    def embedding(self, stream: str) -> list[str]:
        """The states that `Tail.embed` reads; none where the embedding is looked up from ids."""
        return [f"{stream}.embed"]

    def width_of(self, stream: str) -> int:
        """The width of the states of `stream`."""
        return self.width

    def stride(self, stream: str) -> int:
        """Pixels between two neighbours of the map of `stream`; 0 where its rows are no map."""
        return 0

    @property
    def coarsest(self) -> int:
        """The largest stride of a stream in pixels."""
        return max(self.stride(s) for s in self.streams)

    # -- projection: the same backbone, some of whose states are kept in fewer channels ---------------------------
    @property
    def projection(self) -> Projection | None:
        return self._projection

    def projected(self, projection: Projection | None) -> Self:
        """The same backbone as a feature space with `projection` has it."""
        out = copy.copy(self)
        out._projection = projection
        return out

    def full_width(self, state: str) -> int:
        """The width of `state` without any projection: that of its stream, but for what `made_states` says."""
        return self.width_of(stream_of(state))

    def state_width(self, state: str) -> int:
        """The width of `state` as a tuner gets it: its full one, or less where the space has a projection."""
        if self.projection is not None and state in self.projection.basis:
            return self.projection.width
        return self.full_width(state)

    def widened(self, state: str, rows: Tensor) -> Tensor:
        """`rows` of `state` as a tuner gets them → (n, `full_width`), float32."""
        return rows.float() if self.projection is None else self.projection.widened(state, rows)

    def narrowed(self, channels: int, maps: bool = False) -> dict[str, int]:
        """The states that a projection keeps in `channels`, with their own widths: those that are wider than that and
        must not stay full, which of a projection of `maps` none must."""
        full = () if maps else self.full_states()
        widths = {n: self.full_width(n) for n in self.states() if n not in full}
        return {name: width for name, width in widths.items() if width > channels}

    def full_states(self) -> list[str]:
        """The states that no projection touches: what feeds the live layer, the last output of each stream, and what
        embeddings are made of."""
        last = [f"{s}.{i}" for s in self.streams for i in range(self.depth(s))[-2:]]
        return [n for s in self.streams for n in self.embedding(s)] + last

    # -- input ---------------------------------------------------------------------------------------------------
    @property
    def columns(self) -> tuple[str, ...]:
        """Per-row integer inputs kept beside the states."""
        return tuple(f"{s}.ids" for s in self.streams)

    def tables(self) -> dict[str, int]:
        """Column → entries of the table that its numbers are looked up in."""
        return {f"{stream}.ids": self.config.vocab_size for stream in self.streams}

    def refuse_columns(self, lengths: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray]) -> str | None:
        """What is wrong with stored columns, None if they can be inputs: every id is looked up in a table."""
        for name, size in self.tables().items():
            column = columns.get(name)
            if column is not None and len(column) and not 0 <= int(column.min()) <= int(column.max()) < size:
                return f"{name} holds numbers from {column.min()} to {column.max()}, its table has {size} entries"
        return None

    def processor(self, folder: Path) -> Any:
        """What turns a sample into inputs where that is not a tokenizer (images); None otherwise."""
        return None

    @abstractmethod
    def prepare(self, tokenizer: Any, texts: Sequence[Sequence[str]], options: TextOptions) -> Inputs:
        """The fields of each sample → inputs. `tokenizer`: the checkpoint's, or what `processor` gave."""

    def made_up(self, lengths: Mapping[str, np.ndarray], device: torch.device | str = "cpu") -> Batch:
        """A batch of samples of these lengths, stream → (B,), with columns of zeros and without states: what costs are
        counted and timed on. On the meta device too."""
        rows = {stream: int(n.sum()) for stream, n in lengths.items()}
        columns = {c: torch.zeros(rows[stream_of(c)], dtype=torch.long, device=device) for c in self.columns}
        return Batch({}, columns, dict(lengths))

    # -- the frozen model ----------------------------------------------------------------------------------------
    @abstractmethod
    def load(self, folder: Path, dtype: torch.dtype, attention: str, device: torch.device | str) -> nn.Module:
        """The model in eval mode, no parameter trainable. Raises UserError when weights are missing."""

    def make(self, attention: str = "sdpa") -> Any:
        """The model with fresh weights, on the present default device: what costs are counted and timed on."""
        from transformers import AutoModel

        return AutoModel.from_config(self.config, attn_implementation=attention)

    @abstractmethod
    def run(self, model: Any, batch: Batch, states: Sequence[str]) -> dict[str, Tensor]:
        """Collect `states` of `batch` (columns filled in), each (rows, width) in the backbone's own precision.

        Gradients flow where a parameter asks for them: live baselines (LoRA and the like) train through this."""

    # -- what of it stays beside a tuner; see `capabilities.LiveLast` for a live block ----------------------------
    def tail_weights(self, model: Any) -> dict[str, Tensor]:
        """What `tail` needs, from a loaded model; float32 on the host."""
        return {}

    def tail(self, weights: dict[str, Tensor] | None, attention: str) -> Tail:
        """The tail from `weights` alone; None gives the shape only (for counting, on the meta device)."""
        return Tail()
