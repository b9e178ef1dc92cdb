"""The register of backbones, by the model type of a checkpoint's configuration."""

from __future__ import annotations

from typing import Any, TypeVar

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.plugins import load_installed
from pipeline.store.errors import UserError

B = TypeVar("B", bound=type[Backbone])
_BACKBONES: dict[str, type[Backbone]] = {}
HOW_TO_ADD = (
    "`pipeline models` lists all; a family of your own is one file with a class under @register_backbone, loaded by "
    "--import FILE (docs/backbones.md)"
)


def register_backbone(cls: B) -> B:
    """Class decorator: make a backbone known by its model types. Raises ValueError when one is taken."""
    for kind in cls.model_types:
        if kind in _BACKBONES:
            raise ValueError(f"model type {kind!r} is already served by {_BACKBONES[kind].__name__}")
        _BACKBONES[kind] = cls
    for name in cls.timm_names:
        _BACKBONES[f"timm:{name}"] = cls
    return cls


def backbone_classes() -> list[type[Backbone]]:
    """Every registered backbone once, in order of registration."""
    return list(dict.fromkeys(_BACKBONES.values()))


def backbone_for(config: Any) -> Backbone:
    """The backbone that serves a configuration's model type; UserError naming those that exist otherwise."""
    if config.model_type not in _BACKBONES and config.model_type != "timm_wrapper":
        load_installed()
    cls = _BACKBONES.get(config.model_type)
    if config.model_type == "timm_wrapper":
        name = str(config.architecture)
        cls = next((f for f in backbone_classes() if f.timm_names and name.startswith(f.timm_names)), None)
        if cls is None:
            known = ", ".join(f"{n}*" for f in backbone_classes() for n in f.timm_names)
            raise UserError(f"no backbone family for timm's {name!r}; there is one for: {known}; {HOW_TO_ADD}")
    if cls is None:
        raise UserError(f"no backbone family for model type {config.model_type!r}; {_nearest(config)}; {HOW_TO_ADD}")
    return cls(config)


def _nearest(config: Any) -> str:
    """The family that a checkpoint of no family is most like, by its name, else by what its configuration says."""
    kind, types = str(config.model_type), [k for k in _BACKBONES if not k.startswith("timm:")]
    writes = any("CausalLM" in name for name in getattr(config, "architectures", None) or ())
    image = hasattr(config, "image_size") or hasattr(config, "num_channels")
    both = getattr(config, "is_encoder_decoder", False)
    fitting = "t5" if both else "llama" if writes else "vit" if image else "bert"
    within = [k for k in types if k in kind or kind in k]
    nearest = max(within, key=len) if within else fitting if fitting in types else types[0]
    return f"the nearest that works is {nearest}: {_BACKBONES[nearest].description}"
