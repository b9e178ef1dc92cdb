"""What one backbone architecture has to say, and the register of those that do.

A `Family` knows, from a checkpoint's `config.json` alone, which states exist and how wide they are; how to turn text
into `Inputs`; how to run the frozen part and collect states; and how to build the `Tail`, the live last layer with
what it needs to reach an output, from weights kept in the store. Adding a backbone means adding one file that defines
one subclass under `@register`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.extract.backbones.batch import Batch, Layout, stream_of
from pipeline.extract.backbones.fill import check_fit
from pipeline.extract.backbones.inputs import Inputs
from pipeline.extract.plugins import load_installed
from pipeline.extract.projection import Projection
from pipeline.store.errors import UserError


@dataclass(frozen=True)
class TextOptions:
    """How text becomes input ids. `prompt` is used by text-to-text families only; "" elsewhere. `words`: also find out
    which word each position belongs to, which changes nothing else.

    Of image families: `root`, the folder that file names are relative to; `skip_bad`, leave out pictures that cannot be
    read; `image_size`, "HEIGHTxWIDTH" of what the backbone sees, "own" for each
    picture's own, "" for the checkpoint's; `views`, how many fixed
    augmented views of a training picture there are (1: the plain one alone), `augment`, how they are made ("random",
    "flip"), and `view_seed`, which draws random ones;
    `upright`, turn pictures as their EXIF orientation says (False: of spaces made before that was done); `dense`, show
    the whole of each picture, padded at the bottom and the right to the backbone's coarsest stride, and keep as meta
    where it shows what.
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
    words: bool = False


class Tail(nn.Module, ABC):
    """The frozen live end of a backbone: gradients flow through it, its weights never change.

    `forward(hidden, batch)` runs the live last layer. `hidden`: stream → (rows, width); the last stream's rows enter
    the layer, those of earlier streams are what it attends to. Returns (rows of the last stream, width).

    `late`: further live layers before the last, by their number, where a tuner asks for them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.ModuleDict()

    @property
    @abstractmethod
    def last(self) -> nn.Module:
        """The live last layer."""

    @abstractmethod
    def embed(self, batch: Batch, stream: str) -> Tensor:
        """The backbone's embedding output (rows, width), looked up from ids rather than stored."""

    @abstractmethod
    def through(self, block: nn.Module, hidden: dict[str, Tensor], batch: Batch) -> Tensor:
        """`forward` with `block`, a layer of the same kind, in place of the last."""

    def forward(self, hidden: dict[str, Tensor], batch: Batch) -> Tensor:
        return self.through(self.last, hidden, batch)

    def final_norm(self, rows: Tensor, stream: str) -> Tensor:
        """The backbone's own frozen norm after the last block of `stream`; the identity where it has none."""
        return rows

    def logits(self, rows: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Frozen language-model head: (rows, width) → (rows, vocabulary), or only the columns `tokens`."""
        raise NotImplementedError


class SideStack(nn.Module, ABC):
    """Trainable blocks of the backbone's own kind at a fraction of its width, one for each kept layer (LST §3)."""

    width: int

    @abstractmethod
    def context(self, batch: Batch, stream: str, memory: Tensor | None) -> Any:
        """Masks and position biases, made once a forward pass. `memory`: (rows, width) of the stream before."""

    @abstractmethod
    def block(self, index: int, grid: Tensor, context: Any) -> Tensor:
        """Block number `index` of the kept ones on a padded grid (B, L, width)."""

    @abstractmethod
    def final(self, rows: Tensor) -> Tensor:
        """The norm after the last block."""

    def begin(self, weights: dict[str, Tensor], layers: Sequence[int]) -> None:
        """Start from pruned blocks of the backbone, of which side block k is number `layers[k]`. `weights`: of one
        stream, see `Family.pruned`. What is shared by all blocks is looked for in block 0; a norm that the backbone
        does not have stays fresh."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                kind, _, rest = name.partition(".")
                if kind != "blocks":
                    if name in weights:
                        parameter.copy_(weights[name])
                    continue
                number, _, rest = rest.partition(".")
                own = f"{layers[int(number)]}.{rest}"
                parameter.copy_(weights[own if own in weights else f"0.{rest}"])


class Family(ABC):
    """One architecture at one shape. `config` is the checkpoint's Hugging Face configuration."""

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    description: ClassVar[str]
    writes_text: ClassVar[bool] = False  # it has a decoder and a language-model head
    attentions: ClassVar[tuple[str, ...]] = ("sdpa", "eager")
    modality: ClassVar[Literal["text", "image"]] = "text"
    # "sequence": every stream has one width and a block's output keeps its positions. "pyramid": a stream a stage, each
    # coarser and wider than the one before; the last stage's last block is the live one.
    shape: ClassVar[Literal["sequence", "pyramid"]] = "sequence"
    timm_names: ClassVar[tuple[str, ...]] = ()  # beginnings of timm architecture names

    def __init__(self, config: Any) -> None:
        self.config = config
        self.projection: Projection | None = None  # of the feature space at hand

    # -- shape ---------------------------------------------------------------------------------------------------
    streams: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def width(self) -> int: ...

    @property
    @abstractmethod
    def dropout(self) -> float: ...

    @abstractmethod
    def depth(self, stream: str) -> int:
        """Number of blocks of `stream`."""

    def states(self) -> list[str]:
        """Every state that can be collected: the output of each block of each stream."""
        return [f"{s}.{i}" for s in self.streams for i in range(self.depth(s))]

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

    def state_width(self, state: str) -> int:
        """The width of `state` as a tuner gets it: that of its stream, or less where the space has a projection."""
        if self.projection is not None and state in self.projection.basis:
            return self.projection.width
        return self.width_of(state.split(".", 1)[0])

    def full_states(self) -> list[str]:
        """The states that no projection touches: what feeds the live layer, the last output of each stream, and what
        embeddings are made of."""
        last = [f"{s}.{i}" for s in self.streams for i in range(self.depth(s))[-2:]]
        return [n for s in self.streams for n in self.embedding(s)] + last

    def embedding(self, stream: str) -> list[str]:
        """The states that `Tail.embed` reads; none where the embedding is looked up from ids."""
        return []

    def kept_layers(self, method: str, stream: str) -> list[int]:
        """The layers whose states a method uses by default, 0-based, ascending; the paper's choice where it has one."""
        return list(range(self.depth(stream)))

    @property
    def columns(self) -> tuple[str, ...]:
        """Per-row integer inputs kept beside the states."""
        return tuple(f"{s}.ids" for s in self.streams)

    def refuse_columns(self, lengths: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray]) -> str | None:
        """What is wrong with stored columns, None if they can be inputs: every id is looked up in a table."""
        for name, size in self.tables().items():
            column = columns.get(name)
            if column is not None and len(column) and not 0 <= int(column.min()) <= int(column.max()) < size:
                return f"{name} holds numbers from {column.min()} to {column.max()}, its table has {size} entries"
        return None

    def tables(self) -> dict[str, int]:
        """Column → entries of the table that its numbers are looked up in."""
        return {f"{stream}.ids": self.config.vocab_size for stream in self.streams}

    def processor(self, folder: Path) -> Any:
        """What turns a sample into inputs where that is not a tokenizer (images); None otherwise."""
        return None

    # -- input ---------------------------------------------------------------------------------------------------
    @abstractmethod
    def prepare(
        self,
        tokenizer: Any,
        texts: Sequence[Sequence[str]],
        options: TextOptions,
        candidates: Sequence[Sequence[int]] = (),
        gold: Sequence[int] | None = None,
    ) -> Inputs:
        """Text → inputs. `candidates`: token ids of each target of a text-to-text family; `gold`: the index of each
        sample's own target when its states are for training, None when they are for scoring."""

    def candidates(self, tokenizer: Any, targets: Sequence[str]) -> list[list[int]]:
        """Token ids of each target text; empty for families that do not write text."""
        return []

    def with_decoder(self, inputs: Inputs, chains: Sequence[Sequence[int]]) -> Inputs:
        """`inputs` with the decoder positions replaced by the given input ids, one chain a sample (free generation).
        Families that do not write text have none."""
        raise NotImplementedError(f"{self.name} does not generate text")

    def made_up(self, lengths: Mapping[str, np.ndarray], device: torch.device | str = "cpu") -> Batch:
        """A batch of samples of these lengths, stream → (B,), with columns of zeros and without states: what costs are
        counted and timed on. On the meta device too."""
        rows = {stream: int(n.sum()) for stream, n in lengths.items()}
        columns = {c: torch.zeros(rows[stream_of(c)], dtype=torch.long, device=device) for c in self.columns}
        return Batch({}, columns, dict(lengths))

    # -- the frozen part -----------------------------------------------------------------------------------------
    @abstractmethod
    def load(self, folder: Path, dtype: torch.dtype, attention: str, device: torch.device | str) -> nn.Module:
        """The backbone in eval mode, no parameter trainable. Raises UserError when weights are missing."""

    def keep_tokens(self, model: Any, tokens: int) -> None:  # noqa: B027 (most have nothing to cut)
        """Cut from a loaded backbone the rows of its tables from `tokens` on, the number of ids its tokenizer has. Only
        where there is a softmax over them: nothing by default."""

    @abstractmethod
    def run(self, model: nn.Module, batch: Batch, states: Sequence[str]) -> dict[str, Tensor]:
        """Collect `states` of `batch` (columns filled in), each (rows, width) in the backbone's own precision.

        Gradients flow where a parameter asks for them: live counterparts (LoRA and the like) train through this."""

    def stack(self, model: Any, stream: str) -> Sequence[nn.Module]:
        """The blocks of `stream` of a loaded backbone."""
        raise UserError(f"{self.name} backbones have no single list of blocks")

    def last_block(self, model: Any) -> nn.Module:
        """The last block of a loaded backbone, for counterparts that train it."""
        return self.stack(model, self.streams[-1])[-1]

    def finish(self, model: Any, rows: Tensor) -> Tensor:
        """The loaded backbone's own final norm on the rows of its last state; nothing where it has none."""
        return rows

    # -- the live part -------------------------------------------------------------------------------------------
    @abstractmethod
    def tail_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """What `tail` needs, from a loaded backbone; float32 on the host."""

    @abstractmethod
    def tail(self, weights: dict[str, Tensor] | None, attention: str) -> Tail:
        """The tail from `weights` alone; None gives the shape only (for counting, on the meta device)."""

    @abstractmethod
    def norm(self, stream: str) -> nn.Module:
        """A fresh trainable norm of the kind the backbone puts after its last block; Identity where it has none."""

    @abstractmethod
    def side_stack(self, stream: str, layers: Sequence[int], reduction: int) -> SideStack: ...

    # -- what a tuner may ask for beyond that -----------------------------------------------------------------------
    def bare_block(self, attention: str) -> nn.Module:
        """A block like those before the last of the last stream, frozen, with arbitrary weights or on the meta device.
        Raises UserError where blocks differ."""
        raise UserError(f"{self.name} backbones have no late layers that could be live")

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

    def pruned(self, model: Any, importance: dict[str, Tensor], reduction: int, aligned: bool) -> dict[str, Tensor]:
        """Every block cut to the shapes of `side_stack`, `<stream>.<block>.<name>` → tensor (LST §3.3).

        `importance`: parameter name → non-negative tensor of its shape. See `extract.backbones.pruning`."""
        raise UserError(f"init: {self.name} backbones have no pruning yet; use random")

    def logits(self, model: Any, rows: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The loaded backbone's own language-model head, as `Tail.logits`."""
        raise NotImplementedError(f"{self.name} does not write text")


_FAMILIES: dict[str, type[Family]] = {}


def register(cls: type[Family]) -> type[Family]:
    """Class decorator: make a family known by its model types. Raises ValueError when one is taken."""
    for kind in cls.model_types:
        if kind in _FAMILIES:
            raise ValueError(f"model type {kind!r} is already served by {_FAMILIES[kind].__name__}")
        _FAMILIES[kind] = cls
    for name in cls.timm_names:
        _FAMILIES[f"timm:{name}"] = cls
    return cls


def families() -> list[type[Family]]:
    """Every registered family once, in order of registration."""
    return list(dict.fromkeys(_FAMILIES.values()))


def family_for(config: Any) -> Family:
    """The family that serves a configuration's model type; UserError naming those that exist otherwise."""
    if config.model_type not in _FAMILIES and config.model_type != "timm_wrapper":
        load_installed()
    cls = _FAMILIES.get(config.model_type)
    if config.model_type == "timm_wrapper":
        name = str(config.architecture)
        cls = next((f for f in families() if f.timm_names and name.startswith(f.timm_names)), None)
        if cls is None:
            known = ", ".join(f"{n}*" for f in families() for n in f.timm_names)
            raise UserError(f"no backbone family for timm's {name!r}; there is one for: {known}")
    if cls is None:
        known = ", ".join(sorted(k for k in _FAMILIES if not k.startswith("timm:")))
        raise UserError(f"no backbone family for model type {config.model_type!r}; there is one for: {known}")
    return cls(config)


@contextmanager
def collect(blocks: Sequence[tuple[str, nn.Module]], keep: Callable[[str, Tensor], None]):  # type: ignore[no-untyped-def]
    """Forward hooks on named blocks for the length of the context; `keep(name, output)` is called for each."""

    def hook(name: str) -> Callable[..., None]:
        def inner(_module: nn.Module, _args: Any, output: Any) -> None:
            keep(name, output[0] if isinstance(output, tuple) else output)

        return inner

    handles = [module.register_forward_hook(hook(name)) for name, module in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_mask(allowed: Tensor, attention: str, dtype: torch.dtype) -> Tensor:
    """Bool (…, L) mask in the form the attention implementation takes: bool for sdpa, additive for eager."""
    if attention == "sdpa":
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def key_mask(layout: Layout, attention: str, dtype: torch.dtype) -> Tensor:
    """(B, 1, 1, L): every position may attend to every real position."""
    return attention_mask(layout.mask[:, None, None, :], attention, dtype)


def load_frozen(cls: Any, folder: Path, dtype: torch.dtype, attention: str, device: torch.device | str) -> nn.Module:
    """`cls.from_pretrained` from safetensors only, refusing a checkpoint that lacks a weight the states depend on."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, info = cls.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    missing = sorted(k for k in info["missing_keys"] if "pooler" not in k)
    wrong = sorted(str(k) for k in info["mismatched_keys"])
    if missing or wrong:
        raise UserError(
            f"checkpoint {folder}: {len(missing)} weights missing, {len(wrong)} of the wrong shape "
            f"(first: {(missing + wrong)[0]}); the backbone would run on random weights, so nothing was done"
        )
    return model.to(device).eval().requires_grad_(False)


def freeze(module: nn.Module) -> nn.Module:
    """No gradient on the module's own weights; gradients still flow through it."""
    return module.requires_grad_(False)
