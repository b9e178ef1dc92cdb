"""Ours beside the official numbers of one case: outputs, gradients, running statistics.

Tolerances in float32: an output differs by at most 1e-5 of its largest value; a gradient by at most 1e-4 of its largest
value or 1e-6 of the largest gradient of the file, for what is smaller is rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.extract.kernels import dropout, t5_attention
from tests.golden import Case

OUTPUT, GRADIENT, ROUNDING = 1e-5, 1e-4, 1e-6
# Of each mode: what a dropout that is active multiplies with; None where there is none.
MODES = {"eval": None, "train": None, "train-scaled": 0.83, "train-p0": 1.0}
NEGLIGIBLE = 1e-4  # of the largest gradient of a file


class NoSystem(Exception):
    """There is nothing of ours that claims to be what a case was computed by; the message says what is missing."""


@dataclass(frozen=True)
class Place:
    """Where an official tensor lies in ours: the parameter or buffer `name`, and `view`, which gives of it the part in
    the official shape, sharing its memory."""

    name: str
    view: Callable[[Tensor], Tensor] = lambda t: t


@dataclass
class Setup:
    """Ours, ready to run as a case says.

    `module`: what is trained. `places`: official name → place, of every parameter; `buffers` likewise. `run()` gives
    the scalar whose gradient is compared and pairs (ours, official) of outputs by name. `inputs`: inputs whose gradient
    is compared.
    """

    module: nn.Module
    places: dict[str, Place]
    run: Callable[[], tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]]
    buffers: dict[str, Place] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """One tensor: the largest absolute difference and the largest official value. `bound`: what the former may be.
    `rounding`: it is so much smaller than the file's largest gradient that only its size means something."""

    name: str
    gradient: bool
    difference: float
    largest: float
    bound: float
    rounding: bool = False

    @property
    def equal(self) -> bool:
        return self.difference <= self.bound

    @property
    def share(self) -> float:
        """The difference over the largest value."""
        return self.difference / self.largest if self.difference else 0.0

    def __str__(self) -> str:
        kind = "gradient of " if self.gradient else ""
        return f"{kind}{self.name} differs by {self.difference:.2e} of {self.largest:.2e}, allowed {self.bound:.2e}"


def put(setup: Setup, case: Case) -> None:
    """The official weights and running statistics into ours. Every parameter of ours must be filled, and completely."""
    own = {**dict(setup.module.named_parameters()), **dict(setup.module.named_buffers())}
    filled = dict.fromkeys((p.name for p in setup.places.values()), 0)
    with torch.no_grad():
        for part, places in (("weight", setup.places), ("buffer", setup.buffers)):
            official = case.under(part)
            assert official.keys() == places.keys(), f"{part}: {sorted(official.keys() ^ places.keys())}"
            for name, place in places.items():
                view = place.view(own[place.name])
                assert view.shape == official[name].shape, f"{name}: {tuple(view.shape)}"
                view.copy_(official[name])
                if part == "weight":
                    filled[place.name] += view.numel()
    trained = {n: p.numel() for n, p in setup.module.named_parameters() if p.requires_grad}
    assert filled == trained, f"not filled once each: {sorted(k for k in trained if filled.get(k) != trained[k])}"


def differences(case: Case, setup: Setup) -> list[Difference]:
    """Every tensor of `case` against ours, run in the mode of the case."""
    put(setup, case)
    if case.mode not in MODES:
        raise NoSystem(f"mode {case.mode}")
    setup.module.train(case.mode != "eval")
    factor = MODES[case.mode]
    with contextlib.nullcontext() if factor is None else scaled(factor):
        total, pairs = setup.run()
        total.backward()
    official = case.under("output")
    stats = {n.removeprefix("buffer/"): t for n, t in official.items() if n.startswith("buffer/")}
    buffers = dict(setup.module.named_buffers())
    for name, expected in stats.items():
        pairs[f"buffer/{name}"] = (setup.buffers[name].view(buffers[setup.buffers[name].name]), expected)
    left = official.keys() - pairs.keys()
    assert not left, f"outputs that nothing was compared with: {sorted(left)}"
    found = [_difference(n, False, ours, theirs) for n, (ours, theirs) in pairs.items()]
    return found + _gradients(case, setup)


def _gradients(case: Case, setup: Setup) -> list[Difference]:
    official = case.under("grad")
    own = {n: p.grad for n, p in setup.module.named_parameters()}
    whole_file = max((float(g.abs().max()) for g in official.values()), default=0.0)
    found = []
    for name, expected in official.items():
        if name.startswith("input/"):
            grad = setup.inputs[name.removeprefix("input/")].grad
        else:
            whole = own[setup.places[name].name]
            grad = None if whole is None else setup.places[name].view(whole)
        ours = torch.zeros_like(expected) if grad is None else grad
        found.append(_difference(name, True, ours, expected, whole_file))
    left = setup.places.keys() - official.keys()
    assert not left, f"parameters without a gradient in the file: {sorted(left)}"
    return found


def _difference(name: str, gradient: bool, ours: Tensor, theirs: Tensor, whole_file: float = 0.0) -> Difference:
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)}, not {tuple(theirs.shape)}"
    largest = float(theirs.abs().max()) if theirs.numel() else 0.0
    difference = float((ours.detach() - theirs).abs().max()) if theirs.numel() else 0.0
    difference = difference if difference == difference else float("inf")  # a NaN is no agreement
    bound = max(ROUNDING * whole_file, (GRADIENT if gradient else OUTPUT) * largest)
    return Difference(name, gradient, difference, largest, bound, largest <= NEGLIGIBLE * whole_file)


@contextlib.contextmanager
def scaled(factor: float) -> Iterator[None]:
    """Every dropout that is active multiplies with `factor` instead of drawing: equal numbers mean equal places."""
    attention = F.scaled_dot_product_attention

    def drop(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * factor if training and p else x

    def kept(shape: torch.Size, p: float, device: torch.device | str = "cpu") -> tuple[Tensor, float]:
        return torch.ones(shape, dtype=torch.int8, device=device), factor

    def attend(*args: Tensor, dropout_p: float = 0.0, **options: object) -> Tensor:
        out = attention(*args, **options)
        return out * factor if dropout_p else out

    with (
        patch.object(F, "dropout", drop),
        patch.object(F, "scaled_dot_product_attention", attend),
        patch.object(dropout, "kept", kept),
        patch.object(t5_attention, "kept", kept),
    ):
        yield
