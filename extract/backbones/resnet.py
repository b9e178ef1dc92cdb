"""Convolutional networks in stages: ResNet, ResNeXt, Wide ResNet (timm), ResNet (transformers), CIFAR ResNets.

Batch norm is in eval mode everywhere. The live layer is the last bottleneck of the last stage.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from pipeline.extract.backbones.cifar import CifarResNetModel
from pipeline.extract.backbones.pyramid import Pyramid
from pipeline.extract.backbones.registry import register_backbone


@register_backbone
class ResNet(Pyramid):
    """See the module's docstring."""

    name = "resnet"
    model_types = ("resnet", "cifar_resnet")
    timm_names = ("resnet", "resnext", "wide_resnet", "seresnet", "seresnext", "ecaresnet", "skresnet", "skresnext")
    description = "convolutional networks: ResNet, ResNeXt and kin (timm), ResNet (transformers), CIFAR ResNets"
    attentions = ("sdpa",)  # there is none to choose; "sdpa" is what recipes say by default
    hf_attention = "eager"
    hf_classes: ClassVar[dict[str, Any]] = {"resnet": "ResNetModel", "cifar_resnet": CifarResNetModel}

    def stem(self, model: Any, pixels: Tensor) -> Tensor:
        if self.config.model_type == "timm_wrapper":
            return model.maxpool(model.act1(model.bn1(model.conv1(pixels))))
        return model.embedder(pixels)

    def stages(self, model: Any) -> list[list[nn.Module]]:
        if self.config.model_type == "timm_wrapper":
            return [list(getattr(model, f"layer{i}")) for i in range(1, 5)]
        return [list(stage.layers) for stage in model.encoder.stages]

    def channels(self, stage: int) -> int:
        if self.config.model_type == "timm_wrapper":
            return int(self.skeleton.feature_info[stage + 1]["num_chs"])
        return int(self.config.hidden_sizes[stage])

    def grid(self, stream: str, height: int, width: int) -> tuple[int, int]:
        # Strides of two round up: kernel 3, padding 1 (and 7 with 3) give ceil(n / 2).
        small = self.config.model_type == "cifar_resnet"
        halvings = self.streams.index(stream) + (0 if small else 2)
        for _ in range(halvings):
            height, width = -(-height // 2), -(-width // 2)
        return height, width
