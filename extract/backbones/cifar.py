"""The small ResNets of He et al. 2016 §4.2 for 32 × 32 images: depth 6 n + 2, three stages of 16, 32 and 64 channels.

Shortcuts across stages are option A: every second position, new channels filled with zeros; no parameters.
Module names are those of transformers' ResNet (`embedder`, `encoder.stages.S.layers.B`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel


class CifarResNetConfig(PreTrainedConfig):
    """`depth`: 20, 32, 44, 56 or 110. `image_size`: what `Preprocess` takes when the folder says nothing."""

    model_type = "cifar_resnet"
    depth: int = 20
    image_size: int = 32
    hidden_sizes: tuple[int, ...] | list[int] = (16, 32, 64)


class Block(nn.Module):
    """Two 3 × 3 convolutions, each with batch norm, beside an option-A shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        if self.more:
            short = F.pad(short, (0, 0, 0, 0, self.more, self.more))
        return F.relu(out + short)


class Stage(nn.Module):
    def __init__(self, inputs: int, outputs: int, blocks: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Block(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Encoder(nn.Module):
    def __init__(self, widths: list[int], blocks: int) -> None:
        super().__init__()
        pairs = zip([widths[0], *widths], widths, strict=False)
        self.stages = nn.ModuleList(Stage(a, b, blocks, 1 if i == 0 else 2) for i, (a, b) in enumerate(pairs))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


class CifarResNetModel(PreTrainedModel):
    """Without the classifier."""

    config_class = CifarResNetConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        widths = list(config.hidden_sizes)
        first = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.embedder = nn.Sequential(first, nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.encoder = Encoder(widths, (config.depth - 2) // 6)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(b, 3, H, W) → (b, 64, H / 4, W / 4)."""
        x = self.embedder(pixel_values)
        return self.encoder(x)


AutoConfig.register("cifar_resnet", CifarResNetConfig, exist_ok=True)
