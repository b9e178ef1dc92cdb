"""Plain vision transformers: ViT and DeiT of timm, ViT and the CLIP vision tower of transformers. One stream `encoder`.

Rows of an image: class (and distillation) tokens first, then patches row by row. Blocks are pre-norm: a state is the
block's output before the final norm. The embedding output (patches with positions) is a state of its own,
`encoder.embed`: pixels are not kept. The tail is the last block and the final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, ViTModel

from pipeline.extract.backbones.capabilities import ClassToken, LateBlocks
from pipeline.extract.backbones.loading import JOINT, collect, freeze, joint_part, joint_width, with_projection
from pipeline.extract.backbones.masks import key_mask
from pipeline.extract.backbones.registry import register_backbone
from pipeline.extract.backbones.tail import LiveTail
from pipeline.extract.backbones.vision import Vision, fill, in_order, keep, pixel_groups
from pipeline.extract.batch import Batch
from pipeline.store.errors import UserError

EMBED = "encoder.embed"


class VitTail(LiveTail):
    """The last block, the final norm, and `joint`, CLIP's projection, where there is one."""

    def __init__(
        self, block: nn.Module, norm: nn.Module, timm: bool, attention: str, joint: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.block, self.norm, self.timm, self.attention, self.joint = block, norm, timm, attention, joint
        freeze(self)

    @property
    def last(self) -> nn.Module:
        return self.block

    def through(self, block: nn.Module, hidden: dict[str, Tensor], batch: Batch) -> Tensor:
        layout, rows = batch.layout("encoder"), hidden["encoder"]
        lengths = batch.lengths["encoder"]
        # Images of one extent need no mask, and get the very computation the backbone did.
        mask = None if (lengths == lengths[0]).all() else key_mask(layout, self.attention, rows.dtype)
        grid = layout.pad(rows)
        out = block(grid, attn_mask=mask) if self.timm else block(grid, mask)
        return layout.unpad(out[0] if isinstance(out, tuple) else out)

    def final_norm(self, rows: Tensor, stream: str) -> Tensor:
        return self.norm(rows)

    def projected(self, rows: Tensor) -> Tensor:
        return super().projected(rows) if self.joint is None else self.joint(rows)


@register_backbone
class Vit(LateBlocks, ClassToken, Vision):
    """See the module's docstring."""

    name = "vit"
    model_types = ("vit", "clip_vision_model")
    timm_names = ("vit_", "deit_", "deit3_")
    description = "vision transformers: ViT, DeiT (timm), ViT, CLIP vision tower (transformers)"
    streams = ("encoder",)
    hf_classes = {"vit": ViTModel, "clip_vision_model": CLIPVisionModel}  # noqa: RUF012
    timm_options = {"dynamic_img_size": True}  # noqa: RUF012

    @property
    def is_timm(self) -> bool:
        return self.config.model_type == "timm_wrapper"

    @property
    def width(self) -> int:
        return self.skeleton.embed_dim if self.is_timm else self.config.hidden_size

    @property
    def extra_rows(self) -> int:  # type: ignore[override]
        return self.skeleton.num_prefix_tokens if self.is_timm else 1

    def depth(self, stream: str) -> int:
        return len(self.blocks(self.skeleton))

    @property
    def heads(self) -> int:
        return self.skeleton.blocks[0].attn.num_heads if self.is_timm else self.config.num_attention_heads

    def grid(self, stream: str, height: int, width: int) -> tuple[int, int]:
        patch = self.skeleton.patch_embed.patch_size if self.is_timm else (self.config.patch_size,) * 2
        if height % patch[0] or width % patch[1]:
            raise UserError(f"images of {height}x{width} have no whole {patch[0]}x{patch[1]} patches: --image-size")
        return height // patch[0], width // patch[1]

    def stride(self, stream: str) -> int:
        patch = self.skeleton.patch_embed.patch_size if self.is_timm else (self.config.patch_size,)
        return int(patch[0])

    def blocks(self, model: Any) -> Any:
        """The list of blocks."""
        if self.is_timm:
            return model.blocks
        return model.layers if self.config.model_type == "vit" else model.encoder.layers

    def last_norm(self, model: Any) -> nn.Module:
        """The norm after the last block."""
        if self.is_timm:
            return model.norm
        return model.layernorm if self.config.model_type == "vit" else model.post_layernorm

    def embedded(self, model: Any, pixels: Tensor) -> Tensor:
        """(b, 3, H, W) → what enters block 0, (b, rows, D)."""
        if self.is_timm:
            return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))
        own = self.config.image_size
        other = tuple(pixels.shape[-2:]) != ((own, own) if isinstance(own, int) else tuple(own))
        grid = model.embeddings(pixels, interpolate_pos_encoding=other)
        return grid if self.config.model_type == "vit" else model.pre_layrnorm(grid)

    def stack(self, model: Any, stream: str) -> Sequence[nn.Module]:
        return list(self.blocks(model))

    def bare_block(self, attention: str) -> nn.Module:
        with torch.device("meta"):
            return self.blocks(self.make(attention).eval())[0]

    def finish(self, model: Any, rows: Tensor) -> Tensor:
        return self.last_norm(model)(rows)

    def run(self, model: Any, batch: Batch, states: Sequence[str]) -> dict[str, Tensor]:
        blocks = self.blocks(model)
        wanted = [int(s.split(".")[1]) for s in states if s != EMBED]
        dtype = next(model.parameters()).dtype
        parts: dict[str, list[tuple[list[int], Tensor]]] = {s: [] for s in states}
        for places, pixels in pixel_groups(batch):
            grid = self.embedded(model, pixels.to(dtype))
            if EMBED in parts:
                parts[EMBED].append((places, grid))
            named = [(f"encoder.{i}", blocks[i]) for i in wanted]
            with collect(named, lambda name, x, at=places: parts[name].append((at, x))):  # type: ignore[misc]
                for block in blocks[: max(wanted, default=-1) + 1]:
                    grid = block(grid) if self.is_timm else _first(block(grid, None))
        return {s: in_order(parts[s]) for s in states}

    def tail_weights(self, model: Any) -> dict[str, Tensor]:
        joint = {JOINT: model.joint} if hasattr(model, JOINT) else {}
        return keep({"block": self.blocks(model)[-1], "norm": self.last_norm(model), **joint})

    def load(self, folder: Path, dtype: torch.dtype, attention: str, device: torch.device | str) -> nn.Module:
        model = super().load(folder, dtype, attention, device)
        return with_projection(model, folder, self.config, "visual_projection.weight") if self.is_clip else model

    @property
    def is_clip(self) -> bool:
        return bool(self.config.model_type == "clip_vision_model")

    @property
    def projected_width(self) -> int | None:
        return joint_width(self.config) if self.is_clip else None

    def tail(self, weights: dict[str, Tensor] | None, attention: str) -> VitTail:
        with torch.device("meta"):
            model = self.make(attention).eval()
        block, norm = self.blocks(model)[-1], self.last_norm(model)
        joint = joint_part(self.config, weights) if self.is_clip else {}
        fill({"block": block, "norm": norm, **joint}, weights)
        return VitTail(block, norm, self.is_timm, attention, joint.get(JOINT))

    def norm(self, stream: str) -> nn.Module:
        return nn.LayerNorm(self.width, eps=1e-6)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
