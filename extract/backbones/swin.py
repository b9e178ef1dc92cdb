"""Swin transformers (timm). A stream a stage; beside each block's output, its two branches before they are added.

`stage2.3` is the output of block 3 of stage 2, `stage2.3.msa` and `stage2.3.mlp` what its attention and its MLP add to
the stream (after the projection, before the residual sum), `stage1.in` the patch embedding. The tail is the last block
with its shift mask, the final norm and the three patch mergings, which highways beside the backbone inherit frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

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

    def merge(self, rows: Tensor, stage: int, batch: Batch) -> Tensor:
        """(rows of `stage`, C) → (rows of the next, 2C). Stages count from 0."""
        return self.apply_to(self.merges[stage], rows, map_sizes(self.backbone, batch, self.backbone.streams[stage]))


@register_backbone
class Swin(Branches, Pyramid):
    """See the module's docstring."""

    name = "swin"
    model_types = ()
    timm_names = ("swin_",)
    description = "Swin transformers (timm): stages, attention and MLP branches, patch mergings"
    channels_last = True
    timm_options = {"strict_img_size": False}  # noqa: RUF012

    def stem(self, model: Any, pixels: Tensor) -> Tensor:
        return model.patch_embed(pixels)

    def stages(self, model: Any) -> list[list[nn.Module]]:
        return [list(stage.blocks) for stage in model.layers]

    def before(self, model: Any, stage: int) -> list[nn.Module]:
        return [model.layers[stage].downsample]

    def final(self, model: Any) -> nn.Module:
        return model.norm

    def channels(self, stage: int) -> int:
        return int(self.skeleton.feature_info[stage]["num_chs"])

    def grid(self, stream: str, height: int, width: int) -> tuple[int, int]:
        patch = self.skeleton.patch_embed.patch_size
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

    def module_of(self, model: Any, state: str) -> nn.Module:
        stream, number, *branch = state.split(".")
        stage = model.layers[self.streams.index(stream)]
        if number == "in":
            return stage.downsample
        block = stage.blocks[int(number)]
        # The branches end in drop-path modules, which do nothing in eval mode.
        return {"msa": block.drop_path1, "mlp": block.drop_path2}[branch[0]] if branch else block

    def norm(self, stream: str) -> nn.Module:
        return nn.LayerNorm(self.width)

    def tail_parts(self, model: Any) -> dict[str, nn.Module]:
        merges = {f"merge{i}": stage.downsample for i, stage in enumerate(model.layers[1:])}
        return {**super().tail_parts(model), **merges}

    def build_tail(self, parts: dict[str, nn.Module]) -> SwinTail:
        return SwinTail(self, parts["block"], parts["norm"], [m for k, m in parts.items() if k.startswith("merge")])
