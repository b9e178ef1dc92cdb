"""Plain vision transformers: ViT, DeiT, DINOv2 and DINOv3 of timm; ViT, the CLIP vision tower, DINOv2 (with registers)
and DINOv3 of transformers. One stream `encoder`.

Rows of an image: class, distillation and register tokens first, then patches row by row. Blocks are pre-norm: a state
is the block's output before the final norm. The embedding output (patches with positions) is a state of its own,
`encoder.embed`: pixels are not kept. The tail is the last block and the final norm, and where positions turn queries
and keys (DINOv3) what turns them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.extract.backbones.capabilities import ClassToken, LateBlocks, Patches
from pipeline.extract.backbones.loading import JOINT, collect, freeze, joint_part, joint_width, with_projection
from pipeline.extract.backbones.masks import key_mask
from pipeline.extract.backbones.registry import register_backbone
from pipeline.extract.backbones.tail import LiveTail
from pipeline.extract.backbones.vision import Vision, fill, in_order, keep, map_sizes, pixel_groups
from pipeline.extract.batch import Batch
from pipeline.store.errors import UserError

EMBED = "encoder.embed"


# model type of transformers → where its blocks and its final norm are
PLACES = {
    "vit": ("layers", "layernorm"),
    "clip_vision_model": ("encoder.layers", "post_layernorm"),
    "dinov2": ("encoder.layer", "layernorm"),
    "dinov2_with_registers": ("encoder.layer", "layernorm"),
    "dinov3_vit": ("model.layer", "norm"),
}


class VitTail(LiveTail):
    """The last block, the final norm, `rope`, what makes the angles of positions where a block is given them, and
    `joint`, CLIP's projection, where there is one."""

    def __init__(
        self,
        backbone: Vit,
        block: nn.Module,
        norm: nn.Module,
        rope: nn.Module | None,
        attention: str,
        joint: nn.Module | None = None,
    ) -> None:
        super().__init__()
        object.__setattr__(self, "backbone", backbone)
        self.block, self.norm, self.rope, self.attention, self.joint = block, norm, rope, attention, joint
        freeze(self)

    backbone: Vit

    def train(self, mode: bool = True) -> VitTail:
        super().train(mode)
        if self.rope is not None:
            self.rope.eval()  # in training mode it would jitter positions, which the stored states have not seen
        return self

    @property
    def last(self) -> nn.Module:
        return self.block

    def through(self, block: nn.Module, hidden: dict[str, Tensor], batch: Batch) -> Tensor:
        layout, rows = batch.layout("encoder"), hidden["encoder"]
        if self.rope is not None:
            return self._turned(block, self.rope, rows, map_sizes(self.backbone, batch, "encoder"))
        lengths = batch.lengths["encoder"]
        # Images of one extent need no mask, and get the very computation the backbone did.
        mask = None if (lengths == lengths[0]).all() else key_mask(layout, self.attention, rows.dtype)
        return layout.unpad(self.backbone.through_block(block, layout.pad(rows), mask))

    def _turned(self, block: nn.Module, rope: nn.Module, rows: Tensor, shapes: np.ndarray) -> Tensor:
        """Images of one extent have the same angles: they go together, the others apart."""
        parts = rows.split((shapes.prod(1) + self.backbone.extra_rows).tolist())
        done: dict[int, Tensor] = {}
        for tall, wide in np.unique(shapes, axis=0).tolist():
            places = np.flatnonzero((shapes == (tall, wide)).all(1)).tolist()
            angles = self.backbone.angles(rope, tall, wide, rows)
            out = self.backbone.through_block(block, torch.stack([parts[i] for i in places]), None, angles)
            done.update(zip(places, out, strict=True))
        return torch.cat([done[i] for i in range(len(parts))])

    def final_norm(self, rows: Tensor, stream: str) -> Tensor:
        return self.norm(rows)

    def projected(self, rows: Tensor) -> Tensor:
        return super().projected(rows) if self.joint is None else self.joint(rows)


def _is_known(model: nn.Module) -> bool:
    from timm.models.eva import Eva  # imported late: timm takes a quarter of a second, which text need not wait for
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(model, VisionTransformer) or (isinstance(model, Eva) and not model.rope_mixed)


@register_backbone
class Vit(LateBlocks, ClassToken, Patches, Vision):
    """See the module's docstring."""

    name = "vit"
    model_types = tuple(PLACES)
    timm_names = ("vit_", "deit_", "deit3_")
    description = (
        "vision transformers: ViT, DeiT, DINOv2, DINOv3 (timm, transformers), CLIP vision tower (transformers)"
    )
    streams = ("encoder",)
    hf_classes = {  # noqa: RUF012
        "vit": "ViTModel",
        "clip_vision_model": "CLIPVisionModel",
        "dinov2": "Dinov2Model",
        "dinov2_with_registers": "Dinov2WithRegistersModel",
        "dinov3_vit": "DINOv3ViTModel",
    }
    timm_options = {"dynamic_img_size": True}  # noqa: RUF012

    @property
    def is_timm(self) -> bool:
        return self.config.model_type == "timm_wrapper"

    @property
    def skeleton(self) -> Any:
        found = super().skeleton
        if self.is_timm and not _is_known(found):
            raise UserError(f"{self.config.architecture}: a kind of vision transformer that is not supported")
        return found

    @property
    def width(self) -> int:
        return self.skeleton.embed_dim if self.is_timm else self.config.hidden_size

    @property
    def extra_rows(self) -> int:  # type: ignore[override]
        return self.skeleton.num_prefix_tokens if self.is_timm else 1 + getattr(self.config, "num_register_tokens", 0)

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
        return model.blocks if self.is_timm else model.get_submodule(PLACES[self.config.model_type][0])

    def last_norm(self, model: Any) -> nn.Module:
        """The norm after the last block."""
        return model.norm if self.is_timm else getattr(model, PLACES[self.config.model_type][1])

    def rope(self, model: Any) -> nn.Module | None:
        """What makes the angles of positions; None where positions are added to the patches."""
        return getattr(model, "rope" if self.is_timm else "rope_embeddings", None)

    def angles(self, rope: Any, tall: int, wide: int, like: Tensor) -> dict[str, Any]:
        """What each block is given beside its rows for maps of `tall` × `wide` patches; nothing without `rope`."""
        if rope is None:
            return {}
        if self.is_timm:
            return {"rope": rope.get_embed(shape=(tall, wide))}
        side = self.config.patch_size
        return {"position_embeddings": rope(like.new_empty(()).expand(1, 1, tall * side, wide * side))}

    def through_block(self, block: Any, grid: Tensor, mask: Tensor | None, angles: Any = None) -> Tensor:
        """(b, rows, D) through a block. `mask`: as the attention implementation takes it."""
        out = block(grid, **{"attn_mask" if self.is_timm else "attention_mask": mask}, **(angles or {}))
        return out[0] if isinstance(out, tuple) else out

    def embedded(self, model: Any, pixels: Tensor) -> Tensor:
        """(b, 3, H, W) → what enters block 0, (b, rows, D)."""
        if self.is_timm:
            placed = model._pos_embed(model.patch_embed(pixels))
            return model.norm_pre(placed[0] if isinstance(placed, tuple) else model.patch_drop(placed))
        if self.config.model_type not in ("vit", "clip_vision_model"):
            return model.embeddings(pixels)
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
            angles = self.angles(self.rope(model), *self.grid("encoder", *pixels.shape[-2:]), grid)
            with collect(named, lambda name, x, at=places: parts[name].append((at, x))):  # type: ignore[misc]
                for block in blocks[: max(wanted, default=-1) + 1]:
                    grid = self.through_block(block, grid, None, angles)
        return {s: in_order(parts[s]) for s in states}

    def _tail_parts(self, model: Any) -> dict[str, nn.Module]:
        parts = {"block": self.blocks(model)[-1], "norm": self.last_norm(model), "rope": self.rope(model)}
        return {name: part for name, part in parts.items() if part is not None}

    def tail_weights(self, model: Any) -> dict[str, Tensor]:
        joint = {JOINT: model.joint} if hasattr(model, JOINT) else {}
        return keep({**self._tail_parts(model), **joint})

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
            parts = self._tail_parts(self.make(attention).eval())
        joint = joint_part(self.config, weights) if self.is_clip else {}
        fill({**parts, **joint}, weights)
        return VitTail(self, parts["block"], parts["norm"], parts.get("rope"), attention, joint.get(JOINT))

    def norm(self, stream: str) -> nn.Module:
        return nn.LayerNorm(self.width, eps=1e-6)
