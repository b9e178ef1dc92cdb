"""EfficientNets and MobileNetV2 (timm): a stream a stage, and one for the 1 × 1 convolution before the classifier.

`stage3.1` is the output of block 1 of stage 3. The last stream is the convolution before the classifier, which probes
read; the feature pyramid ends at the stage before it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pipeline.extract.backbones.pyramid import Pyramid
from pipeline.extract.backbones.registry import register_backbone


def _convolutions(block: nn.Module) -> list[nn.Conv2d]:
    return [m for m in block.modules() if isinstance(m, nn.Conv2d)]


@register_backbone
class EfficientNet(Pyramid):
    """See the module's docstring."""

    name = "efficientnet"
    model_types = ()
    timm_names = ("mobilenetv2_", "efficientnet", "tf_efficientnet", "mnasnet_")
    description = "MobileNetV2, MnasNet, EfficientNet (timm): inverted bottlenecks in stages"
    attentions = ("sdpa",)  # there is none to choose

    def stem(self, model: Any, pixels: Tensor) -> Tensor:
        return model.bn1(model.conv_stem(pixels))

    def stages(self, model: Any) -> list[list[nn.Module]]:
        return [*(list(stage) for stage in model.blocks), [nn.Sequential(model.conv_head, model.bn2)]]

    def module_of(self, model: Any, state: str) -> nn.Module:
        # The last stage is put together anew at each call; a hook belongs on what stays.
        return model.bn2 if state.startswith(f"{self.streams[-1]}.") else super().module_of(model, state)

    def channels(self, stage: int) -> int:
        return _convolutions(self.stages(self.skeleton)[stage][-1])[-1].out_channels

    def grid(self, stream: str, height: int, width: int) -> tuple[int, int]:
        # Strides of two round up: with "same" padding, and with half an odd kernel.
        blocks = [b for stage in self.stages(self.skeleton)[: self.streams.index(stream) + 1] for b in stage]
        for _ in range(1 + sum(any(c.stride[0] > 1 for c in _convolutions(b)) for b in blocks)):
            height, width = -(-height // 2), -(-width // 2)
        return height, width

    @property
    def levels(self) -> tuple[str, ...]:
        return tuple(f"stage{f['stage']}" for f in self.skeleton.feature_info if f["reduction"] >= 4)
