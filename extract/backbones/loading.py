"""Loading a frozen backbone, and reading the outputs of its modules while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
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


def freeze(module: nn.Module) -> nn.Module:
    """No gradient on the module's own weights; gradients still flow through it."""
    return module.requires_grad_(False)
