"""The identity of a feature space: everything its numbers depend on, and nothing else.

Two spaces that differ in any field never mix. Device, batch size, worker count, sample limit, row order, task name and
which states were asked for are not part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.extract.backbones.base import Backbone, TextOptions
from pipeline.extract.backbones.capabilities import Branches, Levels, Patches
from pipeline.extract.backbones.views import POLICIES
from pipeline.extract.pretrained import Checkpoint
from pipeline.extract.projection import MAPS, parse_projection
from pipeline.store.errors import UserError

FORMAT_VERSION = 1
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class SpaceOptions:
    """The user's choices that are part of a feature space. `format`: how states are stored; `precision`: how the
    backbone computes; `attention`: which implementation of attention it uses; `projection`: none, pca:K,
    orthogonal:K or pca-maps:K, and `projection_fit` the digest of what was fitted."""

    format: str = "float16"
    projection: str = "none"
    projection_fit: str = ""
    precision: str = "float32"
    attention: str = "sdpa"
    text: TextOptions = field(default_factory=TextOptions)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UserError(f"precision: one of {', '.join(PRECISIONS)}, not {self.precision!r}")
        parse_projection(self.projection)
        if self.text.max_length < 1:
            raise UserError(f"max-length: at least 1, not {self.text.max_length}")
        if self.text.truncation_side not in ("left", "right"):
            raise UserError(f"truncation-side: left or right, not {self.text.truncation_side!r}")
        if self.text.stride is not None and not 1 <= self.text.stride < self.text.max_length:
            raise UserError(f"--stride: from 1 to below --max-length {self.text.max_length}, not {self.text.stride}")


def space_identity(checkpoint: Checkpoint, options: SpaceOptions) -> dict[str, Any]:
    """The identity of the space that `checkpoint` makes under `options`: a flat dictionary of JSON scalars.

    A prompt is part of it only where the family reads one; single-stream encoders join text pairs their tokenizer's
    way. Raises UserError for an attention implementation the family does not have.
    """
    backbone = checkpoint.backbone
    if options.attention not in backbone.attentions:
        raise UserError(f"attention: one of {', '.join(backbone.attentions)}, not {options.attention!r}")
    if options.projection != "none":
        kept = parse_projection(options.projection, backbone.width)
        if kept is not None and kept[0] == MAPS:
            if not isinstance(backbone, Levels | Patches):
                raise UserError(f"projection: {backbone.name} backbones have no maps; choose pca or orthogonal")
        elif backbone.shape != "sequence" and not isinstance(backbone, Branches):
            raise UserError(
                f"projection: {backbone.name} backbones have maps of several widths alone; none or pca-maps:K"
            )
    return {
        **_image_fields(checkpoint, options),
        "format_version": FORMAT_VERSION,
        "family": backbone.name,
        "weights": checkpoint.weights_digest,
        "config": checkpoint.config_digest,
        "tokenizer": checkpoint.tokenizer_digest,
        **chosen_fields(backbone, options),
        "projection_fit": options.projection_fit,
        "mode": "eval",
    }


def chosen_fields(backbone: Backbone, options: SpaceOptions) -> dict[str, Any]:
    """The fields of an identity that the user's choices alone decide, but for those of images."""
    return {
        "prompt": options.text.prompt if backbone.writes_text or backbone.continues_text else "",
        "max_length": options.text.max_length,
        "truncation_side": options.text.truncation_side,
        # Spaces of before have no such field: their long texts were cut.
        **({"stride": options.text.stride} if options.text.stride is not None else {}),
        "format": options.format,
        "projection": options.projection,
        "precision": options.precision,
        "attention": options.attention,
        "views": views_text(options.text.views, options.text.view_seed, options.text.augment),
    }


def views_text(views: int, seed: int, augment: str = "random") -> str:
    """How `views` views of a training image are made; how many there are is of the task's table."""
    if views < 2:
        return "none"
    return f"{POLICIES[augment]};seed {seed}" if augment == "random" else POLICIES[augment]


def options_of(identity: Mapping[str, Any]) -> SpaceOptions:
    """The choices that `identity` was made with. Where there are several views, `views` is 2, whatever their number.
    Raises UserError for an identity that does not say them all."""
    try:
        seed = identity["views"].rpartition("seed ")[2]
        text = TextOptions(
            prompt=identity["prompt"],
            max_length=identity["max_length"],
            truncation_side=identity["truncation_side"],
            stride=identity.get("stride"),
            image_size=identity.get("image_size", ""),
            views=1 if identity["views"] == "none" else 2,
            augment="flip" if identity["views"] == POLICIES["flip"] else "random",
            view_seed=int(seed) if seed.isdigit() else 0,
            upright="orientation" in identity,
            dense="padding" in identity,
            frames=identity.get("frames", 0),
        )
        chosen = {k: identity[k] for k in ("format", "projection", "projection_fit", "precision", "attention")}
        return SpaceOptions(**chosen, text=text)
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"the feature space does not say all that it was made with: {error!r}") from None


def differences_of(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, its value in `identity`, its value by `checkpoint`) wherever the space that `checkpoint` makes with the
    options of `identity` is another one. None stands for a field that is not there."""
    now = space_identity(checkpoint, options_of(identity))
    return [(k, identity.get(k), now.get(k)) for k in sorted({*identity, *now}) if identity.get(k) != now.get(k)]


def refuse_other(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
    """UserError naming every field in which `checkpoint` is not what the space of `identity` was extracted with."""
    if differing := differences_of(checkpoint, identity):
        said = "; ".join(f"{name} is {now!r}, was {then!r}" for name, then, now in differing)
        raise UserError(
            f"{checkpoint.name} is not what the feature space was extracted with: {said}; give the checkpoint that was "
            "extracted, --model FOLDER"
        )


def _image_fields(checkpoint: Checkpoint, options: SpaceOptions) -> dict[str, Any]:
    """What images are made of, in words beside the preprocessing's digest; nothing for text."""
    if checkpoint.backbone.modality == "text":
        return {}
    made = checkpoint.tokenizer.sized(options.text.image_size, options.text.dense)
    mean, std = (",".join(f"{v:g}" for v in values) for values in (made.mean, made.std))
    return {
        **({"frames": options.text.frames} if options.text.frames else {}),
        "image_size": made.extent_text,
        "resize": f"{made.interpolation}, crop {made.crop:g}",
        "mean": mean,
        "std": std,
        # Spaces of before have no such field: their images were taken as they lie in the file.
        **({"orientation": "exif"} if options.text.upright else {}),
        **({"padding": f"zeros to {checkpoint.backbone.coarsest}"} if options.text.dense else {}),
    }
