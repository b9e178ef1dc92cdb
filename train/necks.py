"""A feature pyramid out of the single map of a plain vision transformer, for heads that read several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from pipeline.train.features import Feature

STRIDES = (4, 8, 16, 32)  # in pixels, of the maps that dense heads were made for
WIDTH = 256  # of each map in ViTDet


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (b, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimplePyramid(nn.Module):
    """ViTDet's (Li et al. 2022, section 3): from the last map (b, `width`, H, W) alone, `stride` pixels apart, four of
    `out` channels at about 4, 8, 16 and 32 pixels, each a power of two from it: deconvolutions of 2 × 2 to finer ones,
    which halve the channels, with norm and GELU between them, max pooling to coarser ones; then a 1 × 1 and a 3 × 3
    convolution with a norm each.

    `strides`: of the four, in pixels; not whole where patches have 14."""

    def __init__(self, width: int, stride: int, out: int = WIDTH) -> None:
        super().__init__()
        powers = [round(math.log2(stride / target)) for target in STRIDES]  # doublings, halvings where below 0
        self.strides = [stride / 2.0**power for power in powers]
        self.levels = nn.ModuleList(self._level(width, power, out) for power in powers)

    @staticmethod
    def _level(width: int, power: int, out: int) -> nn.Sequential:
        parts: list[nn.Module] = []
        for number in range(power):
            narrow = max(1, width // 2)
            parts += [nn.ConvTranspose2d(width, narrow, 2, 2)]
            parts += [ChannelNorm(narrow, eps=1e-6), nn.GELU()] if number < power - 1 else []
            width = narrow
        # A side that is not even keeps its last row: heads bring maps to each other's sizes.
        parts += [nn.MaxPool2d(2, 2, ceil_mode=True) for _ in range(-power)]
        for kernel in (1, 3):
            parts += [nn.Conv2d(width, out, kernel, padding=kernel // 2, bias=False), ChannelNorm(out, eps=1e-6)]
            width = out
        return nn.Sequential(*parts)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The one map in a list → four, finest first."""
        (single,) = maps
        return [level(single) for level in self.levels]


def neck_for(features: Mapping[str, Feature], out: int = WIDTH) -> SimplePyramid | None:
    """The neck that a head over several maps needs for `features`: of a plain vision transformer's only map a pyramid
    of `out` channels; None where the features are a pyramid, or the last map of one."""
    first, *others = features.values()
    return SimplePyramid(first.width, first.stride, out) if not others and first.kind == "sequence" else None
