"""Swin transformers (timm, transformers). A stream a stage; beside each block, its two branches before the sum.

`stage2.3` is the output of block 3 of stage 2, `stage2.3.msa` and `stage2.3.mlp` what its attention and its MLP add to
the stream (after the projection, before the residual sum), `stage1.in` the patch embedding. The tail is the last block
with its shift mask, the final norm and the three patch mergings, which highways beside the backbone inherit frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.models import swin  # it imports its modules when they are asked for

from pipeline.extract.backbones.capabilities import Branches
from pipeline.extract.backbones.pyramid import Pyramid, PyramidTail
from pipeline.extract.backbones.registry import register_backbone
from pipeline.extract.backbones.vision import map_sizes
from pipeline.extract.batch import Batch
from pipeline.store.errors import UserError


class SwinTail(PyramidTail):
    """Adds `merge`: a stage's rows to the next stage's resolution and width, by the backbone's own frozen merging."""

    def __init__(self, backbone: Swin, block: nn.Module, norm: nn.Module, merges: Sequence[nn.Module]) -> None:
        super().__init__(backbone, block, norm)
        self.merges = nn.ModuleList(merges)
        self.requires_grad_(False)

    merges: nn.ModuleList

    def merge(self, rows: Tensor, stage: int, batch: Batch, merges: nn.ModuleList | None = None) -> Tensor:
        """(rows of `stage`, C) → (rows of the next, 2C). Stages count from 0. `merges`: others than its own."""
        merge = (self.merges if merges is None else merges)[stage]
        return self.apply_to(merge, rows, map_sizes(self.backbone, batch, self.backbone.streams[stage]))


@register_backbone
class Swin(Branches, Pyramid):
    """See the module's docstring."""

    name = "swin"
    model_types = ("swin",)
    timm_names = ("swin_",)
    description = "Swin transformers (timm, transformers): stages, attention and MLP branches, patch mergings"
    channels_last = True
    hf_classes = {"swin": "SwinModel"}  # noqa: RUF012
    timm_options = {"strict_img_size": False}  # noqa: RUF012

    @property
    def is_timm(self) -> bool:
        return self.config.model_type == "timm_wrapper"

    def stem(self, model: Any, pixels: Tensor) -> Tensor:
        if self.is_timm:
            return model.patch_embed(pixels)
        rows, extent = model.embeddings(pixels, interpolate_pos_encoding=True)
        return rows.unflatten(1, extent)

    def through(self, module: Any, grid: Tensor) -> Tensor:
        """transformers' modules take maps as rows and their extent beside them."""
        if self.is_timm:
            return module(grid)
        kinds = swin.modeling_swin
        if not isinstance(module, kinds.SwinLayer | kinds.SwinPatchMerging):
            return module(grid)
        tall, wide = int(grid.shape[1]), int(grid.shape[2])
        if isinstance(module, kinds.SwinPatchMerging):
            return module(grid.flatten(1, 2), (tall, wide)).unflatten(1, (-(-tall // 2), -(-wide // 2)))
        # A map no larger than a window changes the layer's window and shift for good, which later images would see; one
        # that is smaller fits the position table only when it is filled up to a window.
        own = module.window_size, module.shift_size
        try:
            out, _ = module(grid.flatten(1, 2), (tall, wide), always_partition=min(tall, wide) < own[0])
        finally:
            module.window_size, module.shift_size = own
        return out.unflatten(1, (tall, wide))

    def _stages(self, model: Any) -> Any:
        return model.layers if self.is_timm else model.encoder.layers

    def stages(self, model: Any) -> list[list[nn.Module]]:
        return [list(stage.blocks) for stage in self._stages(model)]

    def before(self, model: Any, stage: int) -> list[nn.Module]:
        """The patch merging before a stage from 0: timm has it in that stage, transformers in the one before."""
        if self.is_timm:
            return [model.layers[stage].downsample]
        return [model.encoder.layers[stage - 1].downsample] if stage else []

    def final(self, model: Any) -> nn.Module:
        return model.norm if self.is_timm else model.layernorm

    def channels(self, stage: int) -> int:
        if self.is_timm:
            return int(self.skeleton.feature_info[stage]["num_chs"])
        return int(self.config.embed_dim) * 2**stage

    def grid(self, stream: str, height: int, width: int) -> tuple[int, int]:
        embed = self.skeleton.patch_embed if self.is_timm else self.skeleton.embeddings.patch_embeddings
        patch = embed.patch_size
        if height % patch[0] or width % patch[1]:
            raise UserError(f"images of {height}x{width} have no whole {patch[0]}x{patch[1]} patches: --image-size")
        height, width = height // patch[0], width // patch[1]
        for _ in range(self.streams.index(stream)):
            height, width = -(-height // 2), -(-width // 2)  # an odd side is padded before merging
        return height, width

    def states(self) -> list[str]:
        names = ["stage1.in"]
        for stream in self.streams:
            for i in range(self.depth(stream)):
                names += [f"{stream}.{i}.msa", f"{stream}.{i}.mlp", f"{stream}.{i}"]
        return names

    def full_states(self) -> list[str]:
        """All but the branches, which only adapters read."""
        return [name for name in self.states() if name.count(".") == 1]

    def module_of(self, model: Any, state: str) -> nn.Module:
        stream, number, *branch = state.split(".")
        if number == "in":
            return model.layers[0].downsample if self.is_timm else model.embeddings.dropout
        block: Any = self.stages(model)[self.streams.index(stream)][int(number)]
        if not branch:
            return block
        # The branches end in drop-path modules, which do nothing in eval mode; transformers has one for both.
        names = {"msa": "drop_path1", "mlp": "drop_path2"} if self.is_timm else {"msa": "drop_path", "mlp": "mlp"}
        found: nn.Module = getattr(block, names[branch[0]])
        return found

    def branches(self, model: Any) -> list[tuple[int, Sequence[nn.Module]]]:
        blocks = [(s, i) for s in self.streams for i in range(self.depth(s))]
        names = ("msa", "mlp")
        return [(self.width_of(s), [self.module_of(model, f"{s}.{i}.{name}") for name in names]) for s, i in blocks]

    def norm(self, stream: str) -> nn.Module:
        return nn.LayerNorm(self.width_of(stream))

    def tail_parts(self, model: Any) -> dict[str, nn.Module]:
        merges = {f"merge{i}": self.before(model, i + 1)[0] for i in range(len(self.streams) - 1)}
        return {**super().tail_parts(model), **merges}

    def build_tail(self, parts: dict[str, nn.Module]) -> SwinTail:
        return SwinTail(self, parts["block"], parts["norm"], [m for k, m in parts.items() if k.startswith("merge")])
