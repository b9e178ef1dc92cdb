"""Live baselines: methods that train inside the backbone, for tables beside the tuners. Nothing of them is cached.

Each is one function that makes some of a loaded backbone trainable. An objective's head reads the last state, or, where
it reads maps and the backbone is in stages, its feature pyramid behind a norm a level, as E³VA's tables have it; a
text-to-text backbone is read by its own head and scored among the targets, as tuners are.

There are two presets: ours, for any backbone, and `paper`, what LST and SHERL set beside themselves on T5. The paper's
counts at T5-base with a vocabulary of 32,100 are reproduced: `tests/train/test_published_settings.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5LayerNorm

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.capabilities import Blocks, Branches, LanguageHead, Levels
from pipeline.extract.backbones.live import LiveBackbone
from pipeline.extract.backbones.tail import Tail
from pipeline.extract.batch import Batch, stream_of
from pipeline.extract.kernels.dropout import use_fast_dropout
from pipeline.store.errors import UserError
from pipeline.train.baselines.adapters import (
    VirtualTokens,
    add_adapter,
    add_beside,
    add_biases,
    add_lora,
    free_biases,
)
from pipeline.train.configs import TunerConfig
from pipeline.train.data.live_source import LiveSlot, LiveSource
from pipeline.train.features import Features, Want
from pipeline.train.model import Model, drawn_from
from pipeline.train.objectives.base import Objective
from pipeline.train.tuners.base import Tuner, rows_of
from pipeline.train.tuners.fixed import before_neck

_NORMS = (nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm, T5LayerNorm)
PROMPT, PAPER_PROMPT = 20, 100  # virtual tokens of prompt tuning
BRANCH_ADAPTER = 64  # width of an adapter after attention or MLP of a Swin, in E³VA's tables
BEFORE_NECK = "before_neck"  # what the norms of a pyramid's levels are called in the model


@dataclass(frozen=True)
class Baseline:
    """`prepare(backbone, model)` makes parts of the model trainable or adds to it. `lr`: the rate used by default,
    `lr_text` under a frozen text head. `virtual`: tokens put before every text."""

    name: str
    description: str
    lr: float
    prepare: Callable[[Backbone, nn.Module], None]
    lr_text: float = 1e-3
    virtual: int = 0


def _full(backbone: Backbone, model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("pooler" not in name)


def _bitfit(backbone: Backbone, model: nn.Module) -> None:
    free_biases(model, f"a {backbone.name} backbone")


def _norms(backbone: Backbone, model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _NORMS) or type(module).__name__.endswith("RMSNorm"):  # a class of its own a model type
            module.requires_grad_(True)


def _partial(backbone: Backbone, model: nn.Module) -> None:
    # Under a head that reads maps a stream may come after the pyramid.
    stream = backbone.levels[-1] if hasattr(model, BEFORE_NECK) else backbone.streams[-1]  # type: ignore[attr-defined]
    _blocks("partial-1", backbone, model, stream)[-1].requires_grad_(True)


def _lora(backbone: Backbone, model: nn.Module) -> None:
    add_lora(model, f"a {backbone.name} backbone")


def _adapter(backbone: Backbone, model: nn.Module) -> None:
    _adapters(backbone, model, BRANCH_ADAPTER if isinstance(backbone, Branches) else max(1, backbone.width // 8))


def _adapters(backbone: Backbone, model: nn.Module, inner: int) -> None:
    if isinstance(backbone, Branches):
        for width, modules in backbone.branches(model):
            for branch in modules:
                add_adapter(branch, width, inner)
        return
    if backbone.shape != "sequence":
        raise UserError(f"adapter: {backbone.name} backbones have no token blocks to put it on")
    for stream in backbone.streams:
        for block in _blocks("adapter", backbone, model, stream):
            add_adapter(block, backbone.width, inner)


def _adaptformer(backbone: Backbone, model: nn.Module) -> None:
    """Blocks are asked for their MLP by the name that vision transformers of both libraries give it."""
    seen = isinstance(backbone, Blocks) and backbone.modality == "image"
    blocks = [(s, block) for s in backbone.streams if seen for block in _blocks("adaptformer", backbone, model, s)]
    found = [(s, mlp) for s, block in blocks if isinstance(mlp := getattr(block, "mlp", None), nn.Module)]
    if not found:
        raise UserError(f"adaptformer: {backbone.name} backbones have no MLP of a vision transformer to put it beside")
    for stream, mlp in found:
        add_beside(mlp, backbone.width_of(stream))


def _prompt(backbone: Backbone, model: Any) -> None:
    _prompts(backbone, model, PROMPT)


def _prompts(backbone: Backbone, model: Any, tokens: int) -> None:
    if backbone.modality != "text":
        raise UserError(f"prompt: {backbone.name} backbones read no tokens that virtual ones could stand before")
    model.set_input_embeddings(VirtualTokens(model.get_input_embeddings(), tokens))


def _paper_full(backbone: Backbone, model: nn.Module) -> None:
    _on_t5(backbone)
    _full(backbone, model)


def _paper_bitfit(backbone: Backbone, model: nn.Module) -> None:
    _on_t5(backbone)
    add_biases(model, _NORMS)
    free_biases(model, f"a {backbone.name} backbone")


def _paper_lora(backbone: Backbone, model: nn.Module) -> None:
    _on_t5(backbone)
    add_biases(model, _NORMS)
    add_lora(model, f"a {backbone.name} backbone", rank=32, alpha=32)
    free_biases(model, f"a {backbone.name} backbone")


def _paper_adapter(backbone: Backbone, model: nn.Module) -> None:
    _on_t5(backbone)
    inner = max(1, backbone.width // 16)
    for stream in backbone.streams:
        for block in _blocks("adapter", backbone, model, stream):
            layers: Any = block.layer  # self-attention first, the feed-forward layer last; cross-attention has none
            add_adapter(layers[0].SelfAttention, backbone.width, inner, published=True)
            add_adapter(layers[-1].DenseReluDense, backbone.width, inner, published=True)
    _norms(backbone, model)


def _paper_prompt(backbone: Backbone, model: Any) -> None:
    _on_t5(backbone)
    model.set_input_embeddings(VirtualTokens(model.get_input_embeddings(), PAPER_PROMPT))


def _blocks(what: str, backbone: Backbone, model: nn.Module, stream: str) -> Sequence[nn.Module]:
    if not isinstance(backbone, Blocks):
        raise UserError(f"{what}: it needs {Blocks.what}, which {backbone.name} backbones do not have")
    return backbone.stack(model, stream)


def _on_t5(backbone: Backbone) -> None:
    if backbone.name != "t5":
        raise UserError(
            f"--preset paper: the papers' settings are for T5, not for a {backbone.name} backbone; leave it out"
        )


BASELINES = {
    c.name: c
    for c in (
        Baseline("full", "full fine-tuning", 5e-5, _full, 3e-4),
        Baseline("lora", "LoRA of rank 8 on the attention's queries and values (peft)", 1e-3, _lora),
        Baseline(
            "adapter",
            f"a bottleneck adapter of width D / 8 after each block; on Swin two a block, of width {BRANCH_ADAPTER}",
            1e-3,
            _adapter,
        ),
        Baseline("adaptformer", "a bottleneck of width 64 beside each MLP of a vision transformer", 1e-3, _adaptformer),
        Baseline("prompt", f"prompt tuning: {PROMPT} virtual tokens before the text", 1e-2, _prompt, 0.3, PROMPT),
        Baseline("bitfit", "BitFit: the biases", 1e-3, _bitfit),
        Baseline("norm-tuning", "weights and biases of the norms", 1e-3, _norms),
        Baseline("partial-1", "the last block", 2e-4, _partial),
    )
}

# As LST's released configurations have them; the counts are those of the papers' tables.
PAPER = {
    c.name: c
    for c in (
        Baseline("full", "full fine-tuning", 3e-4, _paper_full, 3e-4),
        Baseline(
            "lora", "LoRA of rank 32, alpha 32 on queries and values, biases added and trained", 3e-4, _paper_lora, 3e-4
        ),
        Baseline(
            "adapter",
            "two adapters of width D / 16 a block, after attention and feed-forward, norms trained",
            3e-4,
            _paper_adapter,
            3e-4,
        ),
        Baseline("prompt", f"{PAPER_PROMPT} virtual tokens before the text", 0.3, _paper_prompt, 0.3, PAPER_PROMPT),
        Baseline("bitfit", "biases added to Linears, norms and the head", 3e-4, _paper_bitfit, 3e-4),
    )
}
PRESETS = {"ours": BASELINES, "paper": PAPER}


SIZED = ("lora", "adapter", "prompt")  # what can have a size of its own: rank, width, tokens


def _sized(name: str, size: int) -> Baseline:
    """A baseline of another size, its rate and scale as in ours."""

    def lora(backbone: Backbone, model: nn.Module) -> None:
        add_lora(model, f"a {backbone.name} backbone", rank=size, alpha=2 * size)

    def adapter(backbone: Backbone, model: nn.Module) -> None:
        _adapters(backbone, model, size)

    def prompt(backbone: Backbone, model: nn.Module) -> None:
        _prompts(backbone, model, size)

    ways = {
        "lora": (f"LoRA of rank {size} on the attention's queries and values (peft)", lora),
        "adapter": (f"a bottleneck adapter of width {size} after each block", adapter),
        "prompt": (f"prompt tuning: {size} virtual tokens before the text", prompt),
    }
    about, prepare = ways[name]
    return replace(BASELINES[name], description=about, prepare=prepare, virtual=size if name == "prompt" else 0)


def _after(method: Baseline, first: int) -> Baseline:
    """A baseline without the embedding and the blocks before `first`: these stay frozen and need no gradient."""

    def prepare(backbone: Backbone, model: nn.Module) -> None:
        for stream in backbone.streams:
            if not 0 < first < backbone.depth(stream):
                raise UserError(
                    f"{method.name}: of the {backbone.depth(stream)} blocks of a {backbone.name} backbone's "
                    f"{stream} 1 to {backbone.depth(stream) - 1} can stay frozen"
                )
        method.prepare(backbone, model)
        for stream in backbone.streams:
            for block in list(_blocks(method.name, backbone, model, stream))[:first]:
                block.requires_grad_(False)
        for name, parameter in model.named_parameters():
            if "embed" in name or "shared" in name:
                parameter.requires_grad_(False)
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError(f"{method.name}: nothing of it lies behind the frozen blocks")

    return replace(method, description=f"{method.description}; the first {first} blocks frozen", prepare=prepare)


def baseline(name: str, preset: str = "ours") -> Baseline:
    """The baseline called `name` in the settings of `preset`; UserError offering the nearest otherwise. A name may have
    a size and a number of first blocks that stay frozen: lora:16, adapter:24@6, full@3."""
    plain, at, first = name.partition("@")
    plain, colon, size = plain.partition(":")
    if (at or colon) and plain in BASELINES:
        if preset != "ours":
            raise UserError(f"--preset {preset}: its baselines have the papers' sizes; leave {name[len(plain) :]} out")
        if (colon and not (size.isdecimal() and int(size))) or (at and not first.isdecimal()):
            raise UserError(f"{name}: expected NAME:SIZE, NAME@BLOCKS or both, such as lora:16@6")
        if colon and plain not in SIZED:
            raise UserError(f"{name}: {plain} has no size; {', '.join(SIZED)} have")
        made = replace(_sized(plain, int(size)) if colon else BASELINES[plain], name=name)
        return _after(made, int(first)) if at else made
    if name in PRESETS[preset]:
        return PRESETS[preset][name]
    if name in BASELINES:
        raise UserError(f"--preset {preset}: the papers have no {name}; they have: {', '.join(PRESETS[preset])}")
    near = difflib.get_close_matches(name, BASELINES, n=2, cutoff=0.4) or list(BASELINES)
    raise UserError(f"unknown baseline {name!r}; did you mean {' or '.join(near)}?")


class Inside(Tuner):
    """A backbone with something trainable in it, `model`, as what hands out features of batches without states: its
    last state, or its feature pyramid where the head reads maps. It is its own tail, and so read by its own head."""

    text_head = continues_text = True

    def __init__(self, method: Baseline, backbone: Backbone, model: nn.Module, wants: Want) -> None:
        super().__init__(TunerConfig(), backbone, cast(Tail, self), wants)
        self.name = method.name  # type: ignore[misc]
        self.method, self.model, self.virtual = method, model, method.virtual
        levels = backbone if wants.kinds == ("map",) and isinstance(backbone, Levels) else None
        self.streams = levels.levels if levels else backbone.streams[-1:]
        model.requires_grad_(False)
        if levels:
            norms = nn.ModuleDict({s: before_neck(backbone, s) for s in self.streams})
            model.add_module(BEFORE_NECK, norms.to(next(model.parameters())).requires_grad_(False))
        method.prepare(backbone, model)
        for module in levels.after_levels(model) if levels else ():  # nothing reads it
            module.requires_grad_(False)
        use_fast_dropout(model)
        self.features = {s: rows_of(backbone, s) for s in self.streams}

    @classmethod
    def states(cls, config: TunerConfig, backbone: Backbone) -> list[str]:
        return []

    def default_lr(self) -> float:
        return self.method.lr_text if self.wants.text_head else self.method.lr

    def train(self, mode: bool = True) -> Inside:
        nn.Module.train(self, mode)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):  # small batches would spoil the statistics
                module.train(False)
        return self

    def forward(self, batch: Batch) -> Features:
        """The last state, behind the backbone's final norm; or its feature pyramid, each level behind its own norm."""
        states = {s: f"{s}.{self.backbone.depth(s) - 1}" for s in self.streams}
        last, first = self.streams[-1], self.backbone.streams[0]
        seen = self._prompted(batch, first) if self.virtual else batch
        found = self.backbone.run(self.model, seen, list(states.values()))
        if norms := getattr(self.model, BEFORE_NECK, None):
            return {s: norms[s](found[state]) for s, state in states.items()}
        rows = found[states[last]]
        if self.virtual and last == first:
            rows = rows[text_rows(batch.lengths[first], self.virtual)]
        if isinstance(self.backbone, Blocks):
            rows = self.backbone.finish(self.model, rows)
        return {last: rows}

    def _prompted(self, batch: Batch, stream: str) -> Batch:
        longest = int(batch.lengths[stream].max()) + self.virtual
        most = getattr(self.backbone.config, "max_position_embeddings", None) or longest
        if longest > most:
            raise UserError(
                f"prompt: a text and {self.virtual} virtual tokens need {longest} positions, the backbone has {most}; "
                "extract with a smaller --max-length"
            )
        table: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        return with_virtual(batch, stream, self.virtual, table.size)

    def logits(self, rows: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(rows, width) → (rows, vocabulary), or only the columns `tokens`."""
        assert isinstance(self.backbone, LanguageHead)
        return self.backbone.logits(self.model, rows, tokens)


class BaselineModel(Model):
    """A baseline in one backbone, `model`, and an objective's head, weights drawn from `seed`."""

    def __init__(
        self, method: Baseline, backbone: Backbone, model: nn.Module, objective: Objective, seed: int = 0
    ) -> None:
        with drawn_from(seed):
            super().__init__(Inside(method, backbone, model, objective.wants), objective)


def text_rows(lengths: np.ndarray, virtual: int) -> Tensor:
    """The rows that are not virtual, where each sample of `lengths` (B,) has `virtual` rows before its own."""
    real = np.repeat(
        np.tile([False, True], len(lengths)), np.stack([np.full_like(lengths, virtual), lengths], 1).ravel()
    )
    return torch.from_numpy(real.nonzero()[0])


def with_virtual(batch: Batch, stream: str, virtual: int, size: int) -> Batch:
    """`batch` with ids size, size + 1, … before each text of `stream`; its other columns are 0 there."""
    lengths = batch.lengths[stream] + virtual
    at = text_rows(batch.lengths[stream], virtual).to(batch.device)
    columns = dict(batch.columns)
    for name, column in batch.columns.items():
        if stream_of(name) == stream:
            columns[name] = column.new_zeros(int(lengths.sum())).index_copy(0, at, column)
    ids = columns[f"{stream}.ids"]
    fake = torch.ones_like(ids, dtype=torch.bool).index_fill(0, at, False)
    ids[fake] = size + torch.arange(virtual, device=ids.device).repeat(len(lengths))
    return replace(batch, columns=columns, lengths={**batch.lengths, stream: lengths}, _derived={})


class InputSlot(LiveSlot):
    """The samples of a `LiveSlot` without any states: the model computes its own."""

    def compute(self, index: np.ndarray) -> Batch:
        return self.inputs.take(index).batch(self.live.device)


class InputSource(InputSlot, LiveSource):
    """The batches of a `LiveSource`, likewise."""


def input_source(source: LiveSource, live: LiveBackbone) -> InputSource:
    """`source` without states."""
    return InputSource(live, source.inputs, source.targets, [], source.order)
