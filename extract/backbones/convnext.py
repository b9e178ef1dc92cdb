"""ConvNeXt, the first and the second version (timm): a stream a stage, a state a block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pipeline.extract.backbones.pyramid import Pyramid
from pipeline.extract.backbones.registry import register_backbone
from pipeline.store.errors import UserError


@register_backbone
class ConvNeXt(Pyramid):
    """See the module's docstring. The live layer is the last block of the last stage."""

    name = "convnext"
    model_types = ()
    timm_names = ("convnext",)
    description = "ConvNeXt and ConvNeXt V2 (timm)"
    attentions = ("sdpa",)  # there is none to choose

    def stem(self, model: Any, pixels: Tensor) -> Tensor:
        return model.stem(pixels)

    def stages(self, model: Any) -> list[list[nn.Module]]:
        return [list(stage.blocks) for stage in model.stages]

    def before(self, model: Any, stage: int) -> list[nn.Module]:
        return [model.stages[stage].downsample]

    def final(self, model: Any) -> nn.Module:
        if not isinstance(model.norm_pre, nn.Identity):
            raise UserError(f"{self.config.architecture}: a norm before the pooling is not supported")
        return model.norm_pre

    def channels(self, stage: int) -> int:
        return int(self.skeleton.feature_info[stage]["num_chs"])

    def grid(self, stream: str, height: int, width: int) -> tuple[int, int]:
        for conv in self._strided(self.streams.index(stream)):
            # Kernel = stride without padding rounds down, an overlapping stem's kernel 3 and padding 1 round up.
            more = 2 * int(conv.padding[0]) - conv.kernel_size[0]
            height, width = ((side + more) // conv.stride[0] + 1 for side in (height, width))
        return height, width

    def _strided(self, stage: int) -> list[nn.Conv2d]:
        """The convolutions with a stride on the way to `stage`, from 0."""
        model = self.skeleton
        ways = [model.stem, *(s.downsample for s in model.stages[: stage + 1])]
        return [m for way in ways for m in way.modules() if isinstance(m, nn.Conv2d) and m.stride[0] > 1]
