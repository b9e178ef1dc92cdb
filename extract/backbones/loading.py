"""Loading a frozen backbone, and reading the outputs of its modules while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pipeline.store.errors import UserError


@contextmanager
def collect(blocks: Sequence[tuple[str, nn.Module]], keep: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Forward hooks on named blocks for the length of the context; `keep(name, output)` is called for each."""

    def hook(name: str) -> Callable[..., None]:
        def inner(_module: nn.Module, _args: Any, output: Any) -> None:
            keep(name, output[0] if isinstance(output, tuple) else output)

        return inner

    handles = [module.register_forward_hook(hook(name)) for name, module in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def load_frozen(cls: Any, folder: Path, dtype: torch.dtype, attention: str, device: torch.device | str) -> nn.Module:
    """`cls.from_pretrained` from safetensors only, refusing a checkpoint that lacks a weight the states depend on."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, info = cls.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    missing = sorted(k for k in info["missing_keys"] if "pooler" not in k)
    wrong = sorted(str(k) for k in info["mismatched_keys"])
    if missing or wrong:
        raise UserError(
            f"checkpoint {folder}: {len(missing)} weights missing, {len(wrong)} of the wrong shape "
            f"(first: {(missing + wrong)[0]}); the backbone would run on random weights, so nothing was done"
        )
    return model.to(device).eval().requires_grad_(False)


JOINT = "joint"  # the module of a loaded CLIP tower, and of its tail, that projects into the joint space


def joint_width(config: Any) -> int | None:
    """The width of the joint space that a CLIP tower's checkpoint projects into; None where it has no projection."""
    named = config.architectures or ()
    return config.projection_dim if any(name.endswith("WithProjection") for name in named) else None


def with_projection(model: nn.Module, folder: Path, config: Any, name: str) -> nn.Module:
    """`model` with CLIP's projection, the tensor `name` of the checkpoint, as its module `JOINT`, where there is one.
    UserError where it is missing or of another shape."""
    if (width := joint_width(config)) is None:
        return model
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 (no mapping)
                weight = tensors.get_tensor(name).float()
                if weight.shape != (width, config.hidden_size):
                    raise UserError(f"{folder}: {name} is of shape {tuple(weight.shape)}, not of the configuration's")
                joint = nn.Linear(config.hidden_size, width, bias=False, device="meta")
                joint.weight = nn.Parameter(weight, requires_grad=False)
                model.add_module(JOINT, joint)
                return model
    raise UserError(f"{folder}: {name} is missing, though the configuration names a model with projection")


def joint_part(config: Any, weights: Mapping[str, Tensor] | None) -> dict[str, nn.Module]:
    """What a tail holds of the projection: an empty module by the name JOINT, {} where there is none in `weights`; of
    None, by the configuration."""
    width = joint_width(config)
    if width is None or (weights is not None and f"{JOINT}.weight" not in weights):
        return {}
    return {JOINT: nn.Linear(config.hidden_size, width, bias=False, device="meta")}


def freeze(module: nn.Module) -> nn.Module:
    """No gradient on the module's own weights; gradients still flow through it."""
    return module.requires_grad_(False)
