"""Backbones in stages: a stream a stage (`stage1`, `stage2`, …), a state a block (`stage3.1`).

Rows of an image in a stream are the positions of its map, row by row. `stage4.pool1` is the last map of stage 1 brought
to the grid of stage 4, the last one: of the positions over each of its positions the largest and the mean value of each
channel, summed. That is what SHERL's CNN form makes of a map before anything is learned; it takes 1 / k² of the bytes,
with k² positions to one. The tail is the last block of the last stage and
the norm after it, if there is one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.extract.backbones.capabilities import Blocks, Levels, LiveLast
from pipeline.extract.backbones.grids import cells, max_cells, mean_cells, per_size
from pipeline.extract.backbones.loading import collect, freeze
from pipeline.extract.backbones.tail import LiveTail
from pipeline.extract.backbones.vision import Vision, fill, in_order, keep, map_sizes, pixel_groups
from pipeline.extract.batch import Batch

_SIDE = 1 << 12  # a multiple of every stride


class PyramidTail(LiveTail):
    """The last block, on maps, and the final norm. `channels_last`: whether the block takes (b, H, W, C)."""

    def __init__(self, backbone: Pyramid, block: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "backbone", backbone)
        self.block, self.norm = block, norm
        freeze(self)

    backbone: Pyramid

    def embed(self, batch: Batch, stream: str) -> Tensor:
        raise NotImplementedError("a staged backbone has no embedding of its own width")

    @property
    def last(self) -> nn.Module:
        return self.block

    def through(self, block: nn.Module, hidden: dict[str, Tensor], batch: Batch) -> Tensor:
        stream = self.backbone.streams[-1]
        return self.apply_to(block, hidden[stream], map_sizes(self.backbone, batch, stream))

    def apply_to(self, module: nn.Module, rows: Tensor, shapes: np.ndarray) -> Tensor:
        """A module of the backbone on packed rows of maps of `shapes` (B, 2)."""
        through = self.backbone.through
        if self.backbone.channels_last:
            return per_size(rows, shapes, lambda x: through(module, x))
        return per_size(rows, shapes, lambda x: through(module, x.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1))

    def final_norm(self, rows: Tensor, stream: str) -> Tensor:
        return self.norm(rows) if stream == self.backbone.streams[-1] else rows

    def train(self, mode: bool = True) -> PyramidTail:
        # Batch norm stays in eval mode: its statistics are frozen, and so is nothing else here that has a mode.
        return super().train(False)


class Pyramid(Blocks, LiveLast, Levels, Vision):
    """What staged families share. Subclasses give `stem`, `stages`, `channels` and `grid`."""

    shape: ClassVar[Literal["sequence", "pyramid"]] = "pyramid"
    channels_last: ClassVar[bool] = False

    @abstractmethod
    def stem(self, model: Any, pixels: Tensor) -> Tensor:
        """(b, 3, H, W) → the map that enters stage 1."""

    @abstractmethod
    def stages(self, model: Any) -> list[list[nn.Module]]:
        """The blocks of each stage, in order; applied one after the other they are the backbone."""

    @abstractmethod
    def channels(self, stage: int) -> int:
        """Width of the states of a stage, from 0."""

    def final(self, model: Any) -> nn.Module:
        """The norm after the last block; Identity where there is none."""
        return nn.Identity()

    @cached_property
    def _depths(self) -> list[int]:
        return [len(blocks) for blocks in self.stages(self.skeleton)]

    @property
    def streams(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"stage{i + 1}" for i in range(len(self._depths)))

    @property
    def width(self) -> int:
        return self.channels(len(self._depths) - 1)

    def width_of(self, stream: str) -> int:
        return self.channels(self.streams.index(stream))

    def depth(self, stream: str) -> int:
        return self._depths[self.streams.index(stream)]

    def stride(self, stream: str) -> int:
        return _SIDE // self.grid(stream, _SIDE, _SIDE)[0]

    @property
    def levels(self) -> tuple[str, ...]:
        """The streams that make up the feature pyramid: of each stride from 4 on the last."""
        return tuple({self.stride(s): s for s in self.streams if self.stride(s) >= 4}.values())

    def after_levels(self, model: Any) -> list[nn.Module]:
        later = self.stages(model)[self.streams.index(self.levels[-1]) + 1 :]
        return [self.final(model), *(block for blocks in later for block in blocks)]

    def embedding(self, stream: str) -> list[str]:
        return []

    def made_states(self) -> list[str]:
        """`stage4.pool1` … `stage4.pool3`, of four stages."""
        return [f"{self.streams[-1]}.pool{i}" for i in range(1, len(self.streams))]

    def full_width(self, state: str) -> int:
        pooled = self._pooled(state)
        return super().full_width(state) if pooled is None else self.channels(pooled)

    def _pooled(self, state: str) -> int | None:
        """The stage, from 0, that a pooled state is of; None for any other state."""
        what = state.split(".")[1]
        return int(what.removeprefix("pool")) - 1 if what.startswith("pool") else None

    def stack(self, model: Any, stream: str) -> Sequence[nn.Module]:
        return self.stages(model)[self.streams.index(stream)]

    def finish(self, model: Any, rows: Tensor) -> Tensor:
        return self.final(model)(rows)

    def run(self, model: Any, batch: Batch, states: Sequence[str]) -> dict[str, Tensor]:
        stages = self.stages(model)
        named = [(s, self.stages(model)[k][-1] if (k := self._pooled(s)) is not None else self.module_of(model, s))
                 for s in states]  # fmt: skip
        last = max(self.streams.index(s.split(".")[0]) for s in states)
        dtype = next(model.parameters()).dtype
        parts: dict[str, list[tuple[list[int], Tensor]]] = {s: [] for s in states}

        def flat(x: Tensor) -> Tensor:
            if x.ndim == 3:
                return x
            return x.flatten(1, 2) if self.channels_last else x.flatten(2).transpose(1, 2)

        for places, pixels in pixel_groups(batch):
            grid_of = partial(self.grid, height=pixels.shape[-2], width=pixels.shape[-1])

            def keep(name: str, x: Tensor, at: list[int] = places, grid_of: Any = grid_of) -> None:
                stage = self._pooled(name)
                rows = flat(x)
                if stage is not None:
                    rows = pooled_maps(rows, grid_of(self.streams[stage]), grid_of(self.streams[-1]))
                parts[name].append((at, rows))

            with collect(named, keep):
                grid = self.stem(model, pixels.to(dtype))
                for number, blocks in enumerate(stages[: last + 1]):
                    for block in (*self.before(model, number), *blocks):
                        grid = self.through(block, grid)
        return {s: in_order([(at, x.reshape(len(at), -1, x.shape[-1])) for at, x in parts[s]]) for s in states}

    def through(self, module: Any, grid: Tensor) -> Tensor:
        """A map through a block, or through a module between stages."""
        return module(grid)

    def before(self, model: Any, stage: int) -> list[nn.Module]:
        """Modules between a stage and the one before it that are not blocks (Swin's patch merging)."""
        return []

    def module_of(self, model: Any, state: str) -> nn.Module:
        """The module whose output a state is."""
        stream, number = state.split(".")
        return self.stages(model)[self.streams.index(stream)][int(number)]

    def tail_parts(self, model: Any) -> dict[str, nn.Module]:
        """Modules whose weights the tail keeps."""
        return {"block": self.stages(model)[-1][-1], "norm": self.final(model)}

    def tail_weights(self, model: Any) -> dict[str, Tensor]:
        return keep(self.tail_parts(model))

    def tail(self, weights: dict[str, Tensor] | None, attention: str) -> PyramidTail:
        with torch.device("meta"):
            model = self.make(attention).eval()
        parts = self.tail_parts(model)
        fill(parts, weights)
        return self.build_tail(parts)

    def build_tail(self, parts: dict[str, nn.Module]) -> PyramidTail:
        return PyramidTail(self, parts["block"], parts["norm"])

    def norm(self, stream: str) -> nn.Module:
        return nn.Identity()


def pooled_maps(rows: Tensor, fine: tuple[int, int], coarse: tuple[int, int]) -> Tensor:
    """Maps (b, fine positions, C) → (b, coarse positions, C): the largest and the mean value over each, summed."""
    count = len(rows)
    fines, coarses = (np.tile(np.asarray(shape, np.int64), (count, 1)) for shape in (fine, coarse))
    cell = cells(fines, coarses, rows.device)
    flat, places = rows.reshape(-1, rows.shape[-1]), count * coarse[0] * coarse[1]
    return (max_cells(flat, cell, places) + mean_cells(flat, cell, places)).view(count, -1, rows.shape[-1])
