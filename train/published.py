"""What papers chose for given backbones, by model type and size; training settings of their tables: `configs/`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.extract.backbones.base import Backbone

# Kept layers on T5 (0-based), by number of blocks; LST Table 1 and SHERL's released scripts. T5-large keeps 13 in SHERL
# (layer 22 is the decoder's guide), 12 in LST; the largest models keep the last one or two.
_BASE = (1, 2, 3, 5, 6, 7, 9, 10, 11)
_LARGE = tuple(range(1, 24, 2))
_T5 = {
    "sherl": {"base": _BASE, "large": tuple(sorted({*_LARGE, 22})), "huge": (22, 23)},
    "lst": {"base": _BASE, "large": _LARGE, "huge": (23,)},
}


def kept_layers(method: str, backbone: Backbone, stream: str) -> list[int]:
    """The layers whose states the paper of `method` keeps of `stream`, 0-based, ascending; [] where it names none."""
    config, depth = backbone.config, backbone.depth(stream)
    if config.model_type != "t5" or method not in _T5 or depth not in (12, 24):
        return []
    huge = config.d_ff >= 16384 or config.d_model >= 2048
    return list(_T5[method]["base" if depth == 12 else "huge" if huge else "large"])
