"""The live layers of a tail, as they are or with something trainable in them (SHERL Fig. 5).

LoRA and trainable biases go into copies of the layers, for the tail is shared and stays frozen; a T5 has no biases, so
its copies get some, from zero. A bottleneck adapter works on a layer's output. Virtual rows (prompt) stand before what
a layer reads first: the sequence itself on encoders; on a text-to-text backbone the encoder's positions, which its
decoder layer attends to. The sizes are the paper's: LoRA and adapters at reduction 16, 30 virtual rows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5LayerNorm

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.tail import LiveTail
from pipeline.extract.batch import Batch, Layout
from pipeline.extract.kernels.bylength import by_length
from pipeline.store.errors import UserError
from pipeline.train.baselines.adapters import Bottleneck, add_biases, add_lora, free_biases

REDUCTION = 16  # LoRA's rank and the adapter's width are the backbone's width over this
PROMPT = 30  # virtual rows


class LiveLayers(nn.Module):
    """Calls live layer i of `layers` on `hidden` as a `Tail` does. `how`: one of `train.configs.TAILS`. `size`:
    of those in `SIZED`, LoRA's rank, the adapter's width, or virtual rows; the paper's where it is None."""

    def __init__(
        self, tail: LiveTail, backbone: Backbone, layers: Sequence[int], how: str, size: int | None = None
    ) -> None:
        super().__init__()
        object.__setattr__(self, "tail", tail)  # not this module's, see Tuner
        self.layers, self.streams = list(layers), backbone.streams
        self.copies, self.adapters, self.prompts = nn.ModuleDict(), nn.ModuleDict(), nn.ParameterDict()
        what = f"the live layer of a {backbone.name} backbone"
        size = size or (PROMPT if how == "prompt" else max(1, backbone.width // REDUCTION))
        for i in self.layers:
            if how in ("lora", "bitfit"):
                block = copy.deepcopy(self._block(i))
                if how == "lora":
                    add_lora(block, what, rank=size, alpha=2 * size)
                else:
                    add_biases(block, (T5LayerNorm,))
                    free_biases(block, what)
                self.copies[str(i)] = block
            elif how == "adapter":
                self.adapters[str(i)] = Bottleneck(backbone.width, size)
            elif how == "prompt":
                self.prompts[str(i)] = nn.Parameter(0.02 * torch.randn(size, backbone.width))

    tail: LiveTail

    def _block(self, index: int) -> nn.Module:
        return self.tail.last if index == self.layers[-1] else self.tail.late[str(index)]

    def forward(self, index: int, hidden: dict[str, Tensor], batch: Batch) -> Tensor:
        """`hidden`: stream → (rows, width). Returns (rows of the last stream, width)."""
        key, first = str(index), self.streams[0]
        block = self.copies[key] if key in self.copies else self._block(index)
        if key in self.prompts:
            rows, batch, real = prepend(hidden[first], batch, first, self.prompts[key])
            out = self.tail.through(block, {**hidden, first: rows}, batch)
            out = out.index_select(0, real) if first == self.streams[-1] else out
        else:
            out = self._through(block, hidden, batch)
        return self.adapters[key](out) if key in self.adapters else out

    def _through(self, block: nn.Module, hidden: dict[str, Tensor], batch: Batch) -> Tensor:
        if not self.training or len(self.streams) > 1:
            # Evaluation computes on the whole grid, as the backbone did, bit for bit. A decoder's grid is small.
            return self.tail.through(block, hidden, batch)
        (stream,) = self.streams
        return by_length(batch, stream, hidden[stream], lambda x, part: self.tail.through(block, {stream: x}, part))


def saved_size(state: Mapping[str, Tensor]) -> int | None:
    """The `size` of the live layers of a saved tuner; None where nothing in them has one."""
    ends = ("lora_A.default.weight", ".down.weight")
    for name, tensor in state.items():
        if ".live." in name and (".prompts." in name or name.endswith(ends)):
            return tensor.shape[0]
    return None


def prepend(rows: Tensor, batch: Batch, stream: str, prompt: Tensor) -> tuple[Tensor, Batch, Tensor]:
    """`prompt` (P, width) before each sample's `rows`: the longer rows, a batch of those lengths, and where the
    sample's own rows are. The batch's columns of `stream` stay as they were."""
    if batch.past is not None:
        raise UserError("tail: a run with virtual tokens in its live layer cannot write text a token at a time")
    old = batch.layout(stream)
    lengths = batch.lengths[stream] + len(prompt)
    new = Layout.of(lengths, rows.device)
    own = torch.arange(len(rows), device=rows.device) + len(prompt) * (old.sample + 1)
    out = rows.new_zeros(len(new.sample), rows.shape[1])
    virtual = (new.first[:, None] + torch.arange(len(prompt), device=rows.device)).flatten()
    out = out.index_copy(0, own, rows).index_copy(0, virtual, prompt.to(rows.dtype).repeat(len(lengths), 1))
    return out, replace(batch, lengths={**batch.lengths, stream: lengths}, _derived={}), own
