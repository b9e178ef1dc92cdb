"""Kept weights into the live layers that a configuration describes: both come from a store, and must agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from pipeline.store.errors import UserError

M = TypeVar("M", bound=nn.Module)


def check_fit(shapes: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raises UserError naming the first of `shapes`, what a live layer is made of, that `weights` do not fill."""
    for name, value in shapes.items():
        found = weights.get(name)
        if found is None or found.shape != value.shape:
            what = "is missing" if found is None else f"is {tuple(found.shape)} instead of {tuple(value.shape)}"
            raise UserError(
                f"the weights kept of the live layer are not those of its configuration: {name} {what}; "
                "restore the store's weights from another copy, or extract again"
            )


def filled(make: Callable[[], M], weights: Mapping[str, Tensor] | None) -> M:
    """What `make` gives, with `weights`; None leaves it as made. Its shapes are looked at on the meta device first, so
    that a configuration allocates nothing that the weights do not fill."""
    if weights is not None:
        with torch.device("meta"):
            shapes = make().state_dict()
        check_fit(shapes, weights)
        if unknown := sorted(weights.keys() - shapes.keys()):
            raise UserError(f"the weights kept of the live layer hold {unknown[0]}, which it has not: extract again")
    if weights is None:
        return make()
    with no_init_weights():  # drawing a table of embeddings that is then overwritten takes longer than reading it
        module = make()
    module.load_state_dict(weights)
    return module
