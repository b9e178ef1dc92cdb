"""Runs of equal shape that step as one: their parameters stacked, one forward and one backward pass for all.

What depends on no run's weights (a mean over the stored states, say) is computed once, products of narrow maps become
products that a processor is good at, and Python is run once. Each run stays what it is alone: dropout is drawn from a
generator of its own, seeded as alone, and clipping, learning rate, moments and schedule are its own. Its model's
parameters and its optimizer's moments are rows of the stack's, so that all else (checkpoints, scores) sees the run as
ever. Nothing random but the dropout of `extract.kernels` is drawn in a stack: whatever else draws, or cannot be
computed for several models at once, raises, and the runs step in turn.
"""

from __future__ import annotations

import logging
import math
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from pipeline.extract.batch import Batch
from pipeline.extract.kernels.dropout import drawing
from pipeline.train.evaluate import autocast
from pipeline.train.fit.finite import NotFinite, counting_nan, nan_told
from pipeline.train.fit.optimizer import reseed, seed_of
from pipeline.train.objectives.base import Outputs

if TYPE_CHECKING:
    from pipeline.train.fit.loop import Training

T = TypeVar("T")
_log = logging.getLogger(__name__)
# Runs in a stack, of narrow models (a probe) and of others: their activations stand in memory together, and on a CPU
# more side networks than this are slower again, since nothing of them stays in its caches.
LARGEST, NARROW = {True: 16, False: 4}, 1 << 16
TOLERANCE = 1e-5  # of a loss, relative: of a stack's first step, beside the losses that its runs have in turn
NOT_A_MODEL = (__file__, str(Path(torch.__file__).parent))  # code that no model is written in

# Of a step: (runs, parameters) gradients, and for each run its loss and, where it is not finite, what is wrong.
Gradients = tuple[Tensor, list[float], list[str]]


class Unstackable(Exception):
    """Why these runs cannot step as one."""


def told(error: Exception) -> str:
    """The first sentence of why runs step in turn, and the line of a model's that cannot be computed for several."""
    text = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
    if isinstance(error, Unstackable):
        return text
    lines = [line for line in traceback.extract_tb(error.__traceback__) if not line.filename.startswith(NOT_A_MODEL)]
    place = f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""
    return f"{type(error).__name__}: {text}{place}"


def alike(run: Training) -> Any:
    """Equal for runs that can stand in one stack at their next step; None for one that steps alone."""
    if not run.alike or run.ranks.world > 1 or run.scaler.is_enabled():
        return None
    options = run.options
    plan = (run.total, options.epochs, options.accumulate, options.betas, options.eps, options.precision)
    return run.alike, run.place, run.state.step, plan


class _Call(nn.Module):
    """A method of a model as a module's forward, which `functional_call` calls."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, batch: Batch) -> Any:
        return getattr(self.model, self.method)(batch)


def called(model: nn.Module, method: str, parameters: Mapping[str, Tensor], batch: Batch) -> Any:
    """`model.method(batch)` with other `parameters`, by name."""
    return functional_call(_Call(model, method), {f"model.{n}": p for n, p in parameters.items()}, (batch,))


class Stack:
    """`runs` of which `alike` is equal, until one of them leaves: `release` then. Raises Unstackable."""

    def __init__(self, runs: Sequence[Training]) -> None:
        first = runs[0]
        self.runs, self.names, self.checked = list(runs), first.names, False
        known = [dict(run.model.named_parameters()) for run in runs]
        self.shapes = [known[0][name].shape for name in self.names]
        if any(run.names != self.names for run in runs) or any(
            [own[name].shape for name in self.names] != self.shapes for own in known
        ):
            raise Unstackable("their parameters differ in name or shape")
        _refuse_buffers(first.model, known[0])
        self.sizes = [shape.numel() for shape in self.shapes]
        self.decayed = sum(n for n, shape in zip(self.sizes, self.shapes, strict=True) if len(shape) >= 2)
        some = known[0][self.names[0]]
        self.values, self.mean, self.square = (
            torch.zeros(len(runs), sum(self.sizes), device=some.device) for _ in range(3)
        )
        if any(p.dtype != self.values.dtype for own in known for p in (own[name] for name in self.names)):
            raise Unstackable(f"their parameters are not all {self.values.dtype}")
        self.step = torch.tensor(float(first.state.step))
        for row, (run, own) in enumerate(zip(runs, known, strict=True)):
            parts = (self._rows(t[row]) for t in (self.values, self.mean, self.square))
            for name, value, mean, square in zip(self.names, *parts, strict=True):
                parameter = own[name]
                state = run.optimizer.state.get(parameter) or {}
                value.copy_(parameter.data)
                parameter.data = value
                if state:
                    mean.copy_(state["exp_avg"]), square.copy_(state["exp_avg_sq"])
                run.optimizer.state[parameter] = {"step": self.step, "exp_avg": mean, "exp_avg_sq": square}
        split = self.values.split(self.sizes, 1)
        self.leaves = {
            name: part.detach().view(len(runs), *shape).requires_grad_()
            for name, part, shape in zip(self.names, split, self.shapes, strict=True)
        }

    def _rows(self, row: Tensor) -> Iterator[Tensor]:
        return (part.view(shape) for part, shape in zip(row.split(self.sizes), self.shapes, strict=True))

    def release(self) -> None:
        """Each run can step alone again."""
        for run in self.runs:
            for state in run.optimizer.state.values():
                state["step"] = self.step.clone()

    def gradients(self, group: Sequence[Batch]) -> Gradients:
        """Those of the mean loss over all of `group`. Whatever is raised: no run has made its step, and none its part
        of one."""
        runs, first = self.runs, self.runs[0]
        for run in runs:
            run.model.begin_step(run.state.step, run.total, run.steps_an_epoch)
        batches = [batch.to(first.device) for batch in group if len(batch)]
        weights = [first.model.weight(batch) for batch in batches]
        whole, generators = sum(weights), [self._generator(run) for run in runs]
        mean, trouble = [0.0] * len(runs), [""] * len(runs)
        gradient: Tensor | None = None
        if not self.checked:
            alone = [self._alone(run, batches[0]) for run in runs]
        for batch, weight in zip(batches, weights, strict=True):
            share = weight / whole if whole else 0.0
            losses = self._losses(batch, generators)
            values = losses.tolist()
            if not self.checked:
                self._compare(values, alone)
            for row, value in enumerate(values):
                mean[row] += value * (share if len(batches) > 1 else 1.0)
                if not math.isfinite(value):
                    trouble[row] = trouble[row] or f"the loss is {value}"
            total = losses.sum() if len(batches) == 1 else losses.sum() * share
            parts = torch.autograd.grad(total, list(self.leaves.values()))
            flat = torch.cat([part.reshape(len(runs), -1) for part in parts], 1)  # a parameter may be one number
            gradient = flat if gradient is None else gradient.add_(flat)
        assert gradient is not None
        return gradient, mean, trouble

    def _generator(self, run: Training) -> torch.Generator:
        return torch.Generator(run.device).manual_seed(seed_of(run.options.seed, run.state.step))

    def _losses(self, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        """(runs,) losses; each generator is as far on as the one of a run alone would be."""
        first = self.runs[0]

        def one(parameters: dict[str, Tensor], number: Tensor) -> Tensor:
            with drawing(generators, number):
                loss: Tensor = called(first.model, "loss", parameters, batch)
            return loss

        with autocast(first.device, first.options.precision):
            found: Tensor = vmap(one, randomness="error")(self.leaves, torch.arange(len(self.runs)))
        return found

    def _alone(self, run: Training, batch: Batch) -> float:
        reseed(run.options.seed, run.state.step, run.device)
        with torch.no_grad(), autocast(run.device, run.options.precision):
            return float(run.model.loss(batch))

    def _compare(self, values: Sequence[float], alone: Sequence[float]) -> None:
        """Raises Unstackable where a model knows more than its parameters tell, so that a run would not be what it is
        alone."""
        for one, other in zip(values, alone, strict=True):
            if math.isfinite(other) and not abs(one - other) <= TOLERANCE * max(1.0, abs(other)):
                raise Unstackable(f"a loss would be {one:g}, which is {other:g} alone")
        self.checked = True

    @torch.no_grad()
    def update(self, gradient: Tensor, losses: Sequence[float], trouble: list[str]) -> list[dict[str, Any] | NotFinite]:
        """The step by what `gradients` gave: what `Training.step` gives, or raises, for each run. What a model's
        `stepped` raises is its own error: all weights have moved, and no run can make this step again."""
        runs, device = self.runs, gradient.device
        norms = torch.linalg.vector_norm(gradient, dim=1).tolist()
        shares, lrs = [], [float(run.optimizer.param_groups[0]["lr"]) for run in runs]
        for row, (run, norm) in enumerate(zip(runs, norms, strict=True)):
            if not trouble[row] and not math.isfinite(norm):
                trouble[row] = f"the gradient's norm is {norm}"
            shares.append(0.0 if trouble[row] else min(1.0, (run.options.clip or math.inf) / (norm + 1e-6)))

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=gradient.dtype, device=device)[:, None]

        if any(trouble):  # such a run leaves; 0 · NaN would still be NaN
            gradient[torch.tensor([bool(t) for t in trouble], device=device)] = 0.0
        if any(share != 1.0 for share in shares):
            gradient.mul_(column(shares))
        self.step += 1
        options, made = runs[0].options, int(self.step)
        beta, gamma = options.betas
        root = math.sqrt(1 - gamma**made)
        decay = [1 - lr * run.options.weight_decay for run, lr in zip(runs, lrs, strict=True)]
        if any(d != 1.0 for d in decay):
            self.values[:, : self.decayed].mul_(column(decay))
        self.mean.lerp_(gradient, 1 - beta)
        self.square.mul_(gamma).addcmul_(gradient, gradient, value=1 - gamma)
        # As in `optimizer.AdamW`: eps stands outside the bias correction.
        size = self.square.sqrt().div_(root).add_(options.eps / root)
        torch.div(self.mean, size, out=size)
        self.values.sub_(size.mul_(column([lr / (1 - beta**made) for lr in lrs])))
        ended: list[dict[str, Any] | NotFinite] = []
        for row, run in enumerate(runs):
            number = run.state.step + 1
            if trouble[row]:
                ended.append(NotFinite(run.advice(trouble[row], number, lrs[row])))
                continue
            run.model.stepped()
            setattr(run.optimizer, "_opt_called", True)  # noqa: B010 (what a schedule looks at to warn of a step that was left out)
            run.schedule.step()
            ended.append(run.entry(number, losses[row], lrs[row], norms[row]))
        return ended


class Stacked:
    """Several models of equal shape that measure as one."""

    def __init__(self, models: Sequence[Any]) -> None:
        known = [dict(model.named_parameters()) for model in models]
        names = [name for name, p in known[0].items() if p.requires_grad]
        _refuse_buffers(models[0], known[0])
        self.models = models
        try:
            self.parameters = {name: torch.stack([own[name].detach() for own in known]) for name in names}
        except (KeyError, RuntimeError):
            raise Unstackable("their parameters differ in name or shape") from None
        self.checked = self.apart = False
        self.latest: tuple[Batch, list[Outputs | NotFinite]] | None = None

    def measured(self, model: Any, batch: Batch) -> Outputs | None:
        """See `evaluate.Together`."""
        if self.apart:
            return None
        if self.latest is None or self.latest[0] is not batch:
            try:
                with _quietly():
                    self.latest = batch, self.measure(batch)
            except Exception as error:  # see `Stacks.step`
                _log.info("%d models measure in turn: %s", len(self.models), told(error))
                self.apart = True
                return None
        found = self.latest[1][[m is model for m in self.models].index(True)]
        if isinstance(found, NotFinite):
            raise found
        return found

    def measure(self, batch: Batch) -> list[Outputs | NotFinite]:
        """What each model's `measure` gives or raises. Raises whatever keeps them from measuring as one."""

        def one(parameters: dict[str, Tensor]) -> tuple[Outputs, list[Tensor]]:
            with counting_nan() as counts:
                out = called(self.models[0], "measure", parameters, batch)
            return out, counts

        out, counts = vmap(one, randomness="error")(self.parameters)
        ended: list[Outputs | NotFinite] = []
        for row in range(len(self.models)):
            bad = max((int(count[row]) for count in counts), default=0)
            own = {name: values[row] for name, values in out.items()}
            ended.append(NotFinite(nan_told(bad, len(batch))) if bad else own)
        if not self.checked:
            self._check(batch, ended)
        return ended

    def _check(self, batch: Batch, ended: Sequence[Outputs | NotFinite]) -> None:
        for model, found in zip(self.models, ended, strict=True):
            if isinstance(found, dict):
                for name, value in model.measure(batch).items():
                    exact = not value.dtype.is_floating_point
                    if not (exact or torch.allclose(found[name], value, rtol=1e-4, atol=1e-5, equal_nan=True)):
                        raise Unstackable(f"{name} would be another than alone")
        self.checked = True


def _refuse_buffers(model: nn.Module, parameters: Mapping[str, Any]) -> None:
    """Raises Unstackable for what is no function of the parameters, running statistics say."""
    if more := [name for name in model.state_dict() if name not in parameters]:
        raise Unstackable(f"the model keeps more than its parameters, such as {more[0]}")


@contextmanager
def _quietly() -> Iterator[None]:
    """torch warns that attention without a form for several models is run for each in turn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def cut(runs: Sequence[T], model: nn.Module) -> list[list[T]]:
    """`runs`, which have models like `model`, a stack each."""
    largest = LARGEST[sum(p.numel() for p in model.parameters() if p.requires_grad) <= NARROW]
    return [list(runs[i : i + largest]) for i in range(0, len(runs), largest)]


class Stacks:
    """The stacks of a pass, made as they are needed."""

    def __init__(self) -> None:
        self.known: list[Stack] = []
        self.apart: dict[str, str] = {}  # `alike` of runs that cannot step as one, and why

    def groups(self, here: Sequence[Training]) -> list[list[Training]]:
        """`here` in groups that may step as one."""
        found: dict[Any, list[Training]] = {}
        for run in here:
            key = None if run.alike in self.apart else alike(run)
            if key is None and run.scaler.is_enabled():
                self.apart.setdefault(run.alike, "float16 scales each loss by a factor of its own")
            found.setdefault(id(run) if key is None else key, []).append(run)
        groups = [part for group in found.values() for part in cut(group, group[0].model)]
        for stack in [s for s in self.known if s.runs not in groups]:
            stack.release()
            self.known.remove(stack)
        return groups

    def step(self, group: Sequence[Training]) -> list[dict[str, Any] | NotFinite] | None:
        """What the step of each of `group` gave; None where they are to step in turn. Whatever keeps their gradients
        from being computed as one is no error, be it of any type: an error of a model itself is met again in turn, and
        raised there. Once weights have moved, what is raised goes through."""
        stack = next((s for s in self.known if s.runs == group), None)
        try:
            if stack is None:
                stack = Stack(group)
                self.known.append(stack)
            with _quietly():
                found = stack.gradients(group[0].group)
        except Exception as error:
            why = self.apart[group[0].alike] = told(error)
            _log.info("%s and %d more step in turn: %s", group[0].run_dir.name, len(group) - 1, why)
            if stack is not None:
                stack.release()
                self.known.remove(stack)
            return None
        return stack.update(*found)


def measuring(runs: Mapping[Any, str]) -> dict[Any, Stacked | None]:
    """For each of `runs`, which has a `model`, what measures it together with those that have the same word; None for
    one alone."""
    found: dict[Any, Stacked | None] = dict.fromkeys(runs)
    for word in dict.fromkeys(runs.values()):
        group = [run for run, own in runs.items() if word and own == word]
        for part in cut(group, group[0].model) if group else []:
            if len(part) > 1:
                try:
                    found |= dict.fromkeys(part, Stacked([run.model for run in part]))
                except Unstackable as error:
                    _log.info("%d models measure in turn: %s", len(part), told(error))
    return found
