"""What a tuner is, and the register of tuners.

A tuner is a typed config that validates itself and a module that turns a `Batch` of named states into features: named
rows that an objective's head reads. It says which states it reads and whether it needs the live tail; it cannot tell a
cached batch from a live one. Adding a tuner means adding one file with a config, a module and
`@register_tuner("name", ConfigClass)`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.capabilities import Capability, WritesText
from pipeline.extract.backbones.tail import Tail
from pipeline.extract.batch import Batch
from pipeline.extract.plugins import load_installed
from pipeline.extract.projection import MAPS
from pipeline.extract.stackable import Stackable
from pipeline.store.errors import UserError
from pipeline.train.configs import SideConfig, TunerConfig
from pipeline.train.features import Feature, Features, Kind, Want
from pipeline.train.learned import Learned


@dataclass(frozen=True)
class Start:
    """First weights that come from the backbone rather than from the seed: made once at extraction, kept in the store.

    `name`: of what is kept. `fisher`: whether importance is the Fisher information on the task's training rows (the
    name is then completed with the task), else the size of the weights. `make(model, importance)`: the tensors that
    `Tuner.begin` takes, from a loaded backbone and the importance of each of its parameters.
    """

    name: str
    fisher: bool
    make: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]


def full_precision(device: torch.device) -> torch.autocast:
    """A context in which autocast is off, for what half precision would spoil."""
    # Autocast knows no meta device, on which the shapes alone are run to count operations.
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


class Tuner(nn.Module):
    """A side network. `forward(batch)` gives the rows of each of `features`. It neither pools nor classifies: that is
    the objective's, whose `wants` says what its head can read.

    `tail` is the frozen live end of the backbone; its parameters are not the tuner's and are never saved with it.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    config_class: ClassVar[type[TunerConfig]]
    shapes: ClassVar[tuple[str, ...]] = ("sequence",)  # shapes of backbones this class works on, see `Backbone.shape`
    needs: ClassVar[tuple[type[Capability], ...]] = ()  # what a backbone must be able to do beyond being run
    one_stream: ClassVar[bool] = False  # True: not on backbones with a decoder beside the encoder
    text_head: ClassVar[bool] = False  # True: can hand out rows for the frozen head of a text-to-text backbone
    continues_text: ClassVar[bool] = False  # True: the same for a decoder alone; no row has seen a later position
    projects: ClassVar[bool] = False  # True: its first maps take states of `backbone.state_width`, projected ones too
    widens: ClassVar[bool] = False  # True: maps kept in fewer channels are widened before norms and heads read them
    # Learning rates that `train` starts from: the papers' under a frozen text head, measured ones elsewhere.
    lr_text: ClassVar[float] = 3e-3
    lr_pooled: ClassVar[float] = 1e-3

    features: dict[str, Feature]  # what `forward` gives, known before any batch

    def __init__(self, config: Any, backbone: Backbone, tail: Tail, wants: Want) -> None:
        super().__init__()
        self.config, self.backbone, self.wants = config, backbone, wants
        # Hidden from parameters(): the tail is shared, frozen and belongs to the feature space.
        object.__setattr__(self, "tail", tail)

    tail: Tail

    @classmethod
    def states(cls, config: Any, backbone: Backbone) -> list[str]:
        """The states this tuner reads, in store order."""
        raise NotImplementedError

    @classmethod
    def reads(cls, projection: str) -> bool:
        """Whether it takes states that `projection` keeps in fewer channels."""
        return cls.widens if projection.startswith(f"{MAPS}:") else cls.projects

    @classmethod
    def refuse(cls, config: Any, backbone: Backbone) -> str | None:
        """What keeps it from working on `backbone` with these options, in one sentence, asked before any work is done;
        None where nothing does. What it needs whatever the options stands in `needs`."""
        return indivisible(config.reduction, backbone.width) if isinstance(config, SideConfig) else None

    @classmethod
    def kept_options(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Options that the weights of a finished run tell, for runs written before there were such options."""
        return {}

    @classmethod
    def start(cls, config: Any, backbone: Backbone) -> Start | None:
        """First weights that must be in the store before training; None where the seed is enough."""
        return None

    def begin(self, weights: dict[str, Tensor]) -> None:
        """Take the weights that `start` asked for."""
        raise NotImplementedError

    @classmethod
    def late_layers(cls, config: Any, backbone: Backbone) -> list[int]:
        """Live layers before the last one, which the tail must hold (`Tail.late`)."""
        return []

    def forward(self, batch: Batch) -> Features:
        raise NotImplementedError

    def penalty(self, head: nn.Module) -> Tensor | None:
        """What a training batch adds to the loss, from the weights of the head; None for nothing."""
        return None

    def begin_step(self, step: int, steps: int) -> None:
        """Called before optimizer step `step`, from 0, of `steps`."""

    def stepped(self, head: nn.Module) -> None:
        """Called after each optimizer step, on every rank, when all ranks have the same weights. Parameters of runs
        that step as one have no `grad`."""

    @classmethod
    def needs_one_head(cls, config: Any) -> str:
        """Why it cannot share a head with other tuners, or have several, as a sentence; "" where it can."""
        if cls.penalty is Tuner.penalty and cls.stepped is Tuner.stepped:
            return ""
        return f"tuner {cls.name} works on the weights of a head of its own: choose another, or one backbone and task"

    def remark(self) -> str:
        """What a person should know of the trained tuner; nothing by default."""
        return ""

    def insights(self, batches: Iterable[Batch]) -> list[Learned]:
        """What the trained tuner does, in numbers for a report; `batches`: samples to look at, where it depends on
        them. Called in eval mode, without gradients."""
        return []

    around_what: ClassVar[str] = "before: the deepest frozen state it reads; after: what it hands to the head"

    def around(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, width) each: a sample's mean features before and after what was trained, for a map of both in a report;
        `around_what` says which they are. Called in eval mode, without gradients."""
        name = self.states(self.config, self.backbone)[-1]
        return batch.mean(name), self.feature_means(self(batch), batch)

    def feature_means(self, features: Features, batch: Batch) -> Tensor:
        """(B, width): the last of `features`, averaged over the rows of each sample."""
        feature = list(self.features)[-1]
        rows, stream = features[feature], self.features[feature].stream
        return batch.layout(stream).mean(rows) if stream else rows

    def train(self, mode: bool = True) -> Tuner:
        # Dropout inside the live layer is on while training, as in the official code (methods §6.1).
        self.tail.train(mode)
        return super().train(mode)

    def default_lr(self) -> float:
        """The learning rate used when none is given."""
        return self.lr_text if self.wants.text_head else self.lr_pooled


_TUNERS: dict[str, type[Tuner]] = {}
_FORMS: dict[tuple[str, str], type[Tuner]] = {}


def register_tuner(name: str, config_class: type[TunerConfig]) -> Callable[[type[Tuner]], type[Tuner]]:
    """Class decorator: make a tuner known by `name`. Raises ValueError for a taken name or a malformed class."""

    def inner(cls: type[Tuner]) -> type[Tuner]:
        if name in _TUNERS:
            raise ValueError(f"tuner {name!r} is already registered by {_TUNERS[name].__name__}")
        if not issubclass(cls, Tuner) or "states" not in cls.__dict__ or not getattr(cls, "description", ""):
            raise ValueError(f"{cls.__name__} must subclass Tuner and define `states` and `description`")
        if any(f.default is MISSING and f.default_factory is MISSING for f in fields(config_class)):
            raise ValueError(f"{config_class.__name__}: every option of a tuner needs a default")
        cls.name, cls.config_class = name, config_class
        _TUNERS[name] = cls
        return cls

    return inner


def form(name: str, shape: str) -> Callable[[type[Tuner]], type[Tuner]]:
    """Class decorator: the form that tuner `name` has on backbones of another shape. It shares the tuner's config."""

    def inner(cls: type[Tuner]) -> type[Tuner]:
        if (name, shape) in _FORMS or name not in _TUNERS:
            raise ValueError(f"{cls.__name__}: tuner {name!r} is unknown, or has a {shape} form already")
        cls.name, cls.config_class, cls.shapes = name, _TUNERS[name].config_class, (shape,)
        _FORMS[name, shape] = cls
        return cls

    return inner


def tuner_names(backbone: type[Backbone] | None = None) -> list[str]:
    """Registered names, in order of registration; with `backbone`, of those that work on such."""
    return [n for n in _TUNERS if backbone is None or not _lacks(_form_for(n, backbone), backbone)]


def _form_for(name: str, backbone: type[Backbone]) -> type[Tuner]:
    return _FORMS.get((name, backbone.shape), _TUNERS[name])


def _lacks(cls: type[Tuner], backbone: type[Backbone]) -> str:
    """Why the tuner cannot work on such backbones, "" where it can."""
    if backbone.shape not in cls.shapes or (cls.one_stream and issubclass(backbone, WritesText)):
        return f"has no form for {backbone.name} backbones"
    lacking = [need.what for need in cls.needs if not issubclass(backbone, need)]
    return f"needs {' and '.join(lacking)}, which {backbone.name} backbones do not have" if lacking else ""


def tuner_class(name: str, backbone: Backbone | None = None) -> type[Tuner]:
    """The tuner called `name`, in its form for `backbone` if given; of an installed plug-in too.

    UserError offering the nearest names for an unknown one, or saying what it lacks on `backbone` and which work there.
    """
    if name not in _TUNERS:
        load_installed()
    if name in _TUNERS:
        if backbone is None:
            return _TUNERS[name]
        cls = _form_for(name, type(backbone))
        if lacks := _lacks(cls, type(backbone)):
            others = ", ".join(tuner_names(type(backbone)))
            raise UserError(f"tuner {name!r} {lacks}; those that work on them: {others}")
        return cls
    near = difflib.get_close_matches(name, _TUNERS, n=3, cutoff=0.4) or list(_TUNERS)
    raise UserError(f"unknown tuner {name!r}; did you mean {' or '.join(near)}? `pipeline tuners` lists them")


def fitting_tuner(name: str, config: TunerConfig, backbone: Backbone) -> type[Tuner]:
    """The door: `tuner_class`, with these options. UserError, one sentence, where it cannot work on `backbone`."""
    cls = tuner_class(name, backbone)
    if why := cls.refuse(config, backbone):
        raise UserError(why)
    return cls


def tuner_config(name: str, options: dict[str, Any]) -> TunerConfig:
    """A tuner's config from plain options; UserError naming one that the tuner does not have or refuses."""
    cls = tuner_class(name).config_class
    known = {f.name for f in fields(cls)}
    for key in options:
        if key not in known:
            raise UserError(f"tuner {name!r} has no option {key!r}; it has: {', '.join(sorted(known))}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"tuner {name!r}: {error}") from None


def rows_of(backbone: Backbone, stream: str, width: int | None = None) -> Feature:
    """What a tuner hands out that keeps the positions of `stream`; `width`: the backbone's own if not given."""
    kind: Kind = "sequence" if backbone.shape == "sequence" else "map"
    skip = backbone.extra_rows if kind == "sequence" else 0
    place = backbone.streams.index(stream) if kind == "map" else 0
    return Feature(
        backbone.width_of(stream) if width is None else width, stream, kind, backbone.stride(stream), skip, place=place
    )


def indivisible(reduction: int, width: int) -> str | None:
    """Why `width` / `reduction` is no width of a side network; None where it is one."""
    if reduction < 1 or width % reduction:
        return f"reduction: must be a divisor of the backbone's width {width}, not {reduction}"
    return None


def checked_reduction(reduction: int, width: int) -> int:
    """width / reduction, the side network's width. Raises UserError unless it divides."""
    if why := indivisible(reduction, width):
        raise UserError(why)
    return width // reduction


class StateLinear(nn.Linear):
    """A linear map of states, which may come in fewer bits than the weight has. They are widened for each product and
    kept for the backward pass as they came: half the bytes, and those of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return state_linear(x, self.weight, self.bias)


def state_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b of `x` (…, width) in the precision of `weight`, or in autocast's, as in `StateLinear`."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):  # autocast knows no meta device
        return F.linear(x, weight, bias)
    if x.dtype == weight.dtype or x.requires_grad:
        return F.linear(x.to(weight.dtype), weight, bias)
    return _Widened.run(x, weight, bias)


class _Widened(Stackable):
    """`x` has no gradient, so that all its backward pass needs is `x`."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x.to(weight.dtype), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.biased = inputs[2] is not None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
        """The maps of several models on the same states are one map with all their outputs."""
        if in_dims[0] is not None or in_dims[1] != 0 or in_dims[2] not in (0, None):
            raise RuntimeError("maps of several models are stacked by their first dimension")
        n, outputs, inputs = weight.shape
        if bias is not None:
            bias = bias.expand(n, outputs).flatten() if in_dims[2] is None else bias.flatten()
        joint = _Widened.run(x, weight.reshape(n * outputs, inputs), bias)
        return joint.unflatten(-1, (n, outputs)).movedim(-2, 0).contiguous(), 0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor | None]:
        (x,) = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        wide = x.flatten(0, -2).to(grad.dtype)
        # In this order, which is torch's own, a CPU is faster than with rows.t() @ wide.
        return None, (wide.t() @ rows).t(), rows.sum(0) if ctx.biased else None


def linear(inputs: int, outputs: int, std: float = 0.01) -> nn.Linear:
    """A linear map initialised N(0, std²) with zero bias, as the official SHERL and LST code does on T5."""
    layer = StateLinear(inputs, outputs)
    with torch.no_grad():
        layer.weight.normal_(std=std)
        layer.bias.zero_()
    return layer
