"""Runs that step as one are what they are alone, and who cannot step as one steps in turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.extract.kernels.dropout import use_fast_dropout
from pipeline.train.fit.finite import NotFinite, refuse_nan
from pipeline.train.fit.loop import FitOptions, Training
from pipeline.train.fit.stack import Stack
from pipeline.train.fit.together import fit_all
from tests.train.test_loop import scorer, source, toy_space  # noqa: F401
from tests.train.toys import ToyModel


class Model(ToyModel):
    """Each value of a batch is dropped before any weight has touched it, and after."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.body.insert(0, nn.Dropout(0.2))
        use_fast_dropout(self)

    def measure(self, batch: Any) -> dict[str, torch.Tensor]:
        return {"label": refuse_nan(self(batch)).argmax(-1)}


def trained(folder: Path, models: list[Any], alike: str, stacked: list[int], monkeypatch: Any, **given: Any) -> Any:
    """(what each ended with, their logs without times); `stacked`: how many runs stood in each step that was tried."""
    with monkeypatch.context() as patched:
        real = Stack.gradients
        patched.setattr(Stack, "gradients", lambda self, *g: stacked.append(len(self.runs)) or real(self, *g))
        train, dev, runs = source(), source(range(80, 95)), []
        for number, model in enumerate(models):
            own = {name: values[number] for name, values in given.items()}
            options = FitOptions(**{"epochs": 2, "lr": 1e-2, **own})
            run = Training(model, train, dev, None, options, folder / str(number), scorer, torch.device("cpu"))
            run.alike = alike
            runs.append(run)
        ended = fit_all(runs, progress=False)
    logs = []
    for run in runs:
        lines = map(json.loads, (run.run_dir / "log.jsonl").read_text().splitlines())
        logs.append([{k: v for k, v in line.items() if "seconds" not in k} for line in lines])
    return ended, logs


def both(folder: Path, make: Any, monkeypatch: Any, **given: Any) -> tuple[list[int], Any, Any]:
    """Stacked and in turn."""
    stacked: list[int] = []
    count = len(given["seed"])
    one = trained(folder / "one", [make(s) for s in range(count)], "same", stacked, monkeypatch, **given)
    turn = trained(folder / "turn", [make(s) for s in range(count)], "", [], monkeypatch, **given)
    for a, b in zip(one[1], turn[1], strict=True):
        for x, y in zip(a, b, strict=True):
            flat = [{**{k: v for k, v in e.items() if k != "validation"}, **e.get("validation", {})} for e in (x, y)]
            assert flat[0] == pytest.approx(flat[1], abs=1e-5, rel=1e-4)
    return stacked, one[0], turn[0]


def test_a_stack_is_its_runs(tmp_path, monkeypatch):
    options = {"seed": [0, 7, 7], "lr": [1e-2, 3e-2, 1e-3], "weight_decay": [0.0, 0.3, 0.0], "clip": [0.1, 0, 1.0]}
    stacked, ended, _ = both(tmp_path, Model, monkeypatch, accumulate=[2, 2, 2], **options)
    assert set(stacked) == {3} and len(stacked) == ended[0]["steps"] > 4
    logs = [(tmp_path / "one" / str(i) / "log.jsonl").read_text() for i in range(3)]
    assert len(set(logs)) == 3


class Gated(Model):
    """With a parameter that is a single number, as SHERL's gates are."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.gate = nn.Parameter(torch.tensor(0.5))

    def forward(self, batch: Any) -> torch.Tensor:
        return super().forward(batch) * self.gate


def test_a_parameter_may_be_a_single_number(tmp_path, monkeypatch):
    stacked, ended, _ = both(tmp_path, Gated, monkeypatch, seed=[0, 1], weight_decay=[0.1, 0.1])
    assert set(stacked) == {2} and len(stacked) == ended[0]["steps"]


def test_dropout_is_each_runs_own(tmp_path, monkeypatch):
    """Of equal weights and learning rates the seed of dropout alone tells the losses apart."""
    stacked, *_ = both(tmp_path, lambda number: Model(0), monkeypatch, seed=[0, 1, 1])
    first = [
        json.loads((tmp_path / "one" / str(i) / "log.jsonl").read_text().splitlines()[0])["loss"] for i in range(3)
    ]
    assert set(stacked) == {3} and first[0] != pytest.approx(first[1], abs=1e-3)
    assert first[1] == pytest.approx(first[2], abs=1e-6)


def test_a_run_that_diverges_leaves_its_stack(tmp_path, monkeypatch):
    class Steep(Model):
        def loss(self, batch: Any) -> torch.Tensor:
            return super().loss(batch) / (self.body[1].weight.abs().max() < 1e6)

    stacked, ended, turn = both(tmp_path, Steep, monkeypatch, seed=[0, 1, 2], lr=[1e-2, 1e7, 1e-2], clip=[0, 0, 0])
    assert isinstance(ended[1], NotFinite) and str(ended[1]) == str(turn[1])
    assert set(stacked) == {2, 3} and ended[0]["steps"] == turn[0]["steps"]


def test_runs_that_end_early_leave_the_others_a_stack(tmp_path, monkeypatch):
    stacked, ended, _ = both(tmp_path, Model, monkeypatch, seed=[0, 1, 2], epochs=[3] * 3, lr=[1e-9, 1e-2, 1e-2],
                             patience=[1, None, None])  # fmt: skip
    assert set(stacked) == {2, 3} and ended[0]["stopped"] == "patience" and ended[1]["stopped"] == "done"


class Drawing(Model):
    """Draws what no generator of a run's own stands behind."""

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss(batch) * (1 + 0.1 * torch.rand(()))


class Remembering(Model):
    """Knows more than its parameters."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.factor = 1.0 + seed

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss(batch) * self.factor


class Counting(Model):
    """Has running statistics."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.norm = nn.BatchNorm1d(5)


class Branching(Model):
    """Its course depends on values."""

    def loss(self, batch: Any) -> torch.Tensor:
        loss = super().loss(batch)
        return loss if loss.item() > 0.5 else 2 * loss


class Tying(Model):
    """Says again whose weights are whose: in a stack they are no parameters, and that a TypeError."""

    def loss(self, batch: Any) -> torch.Tensor:
        self.body[1].weight = self.body[1].weight
        return super().loss(batch)

    def measure(self, batch: Any) -> dict[str, torch.Tensor]:
        self.body[1].weight = self.body[1].weight
        return super().measure(batch)


class Looking(Model):
    """Knows its parameters by what they are, which in a stack they are not: a KeyError there alone."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.shares = {id(p): 1.0 for p in self.parameters()}

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss(batch) * self.shares[id(self.body[1].weight)]


@pytest.mark.parametrize("model", [Drawing, Remembering, Counting, Branching, Tying, Looking])
def test_what_cannot_step_as_one_steps_in_turn(tmp_path, monkeypatch, model):
    stacked, ended, _ = both(tmp_path, model, monkeypatch, seed=[0, 1])
    assert len(stacked) <= 1  # tried once at most
    assert all(end["in_turn"] and end["stacked"] == 1 for end in ended)


def test_why_they_step_in_turn_names_the_place(tmp_path, monkeypatch):
    (first, second), _ = trained(tmp_path, [Tying(0), Tying(1)], "same", [], monkeypatch)
    assert first["in_turn"] == second["in_turn"]
    line = Tying.loss.__code__.co_firstlineno + 1
    assert first["in_turn"].startswith("TypeError: ") and first["in_turn"].endswith(f"(test_stack.py, line {line})")


@pytest.mark.parametrize("method", ["loss", "measure"])
def test_an_error_of_a_model_itself_is_raised_where_it_stands(tmp_path, monkeypatch, method):
    class Wrong(Model):
        pass

    def wrong(self: Any, batch: Any) -> Any:
        return len(3)  # type: ignore[arg-type]

    setattr(Wrong, method, wrong)
    with pytest.raises(TypeError, match="has no len") as caught:
        trained(tmp_path, [Wrong(0), Wrong(1)], "same", [], monkeypatch)
    assert caught.traceback[-1].name == "wrong" and "during handling" not in str(caught.getrepr()).lower()


class Ending(Model):
    """Has something to do after each step, which fails in a stack alone: there no parameter has a `grad`."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.ended = 0

    def stepped(self) -> None:
        self.ended += 1
        self.norm = self.body[1].weight.grad.norm()


class Failing(Ending):
    """Fails in turn, too."""

    def stepped(self) -> None:
        self.ended += 1
        raise ValueError("after the step")


@pytest.mark.parametrize(("model", "error"), [(Ending, AttributeError), (Failing, ValueError)])
def test_no_step_is_made_twice(tmp_path, monkeypatch, model, error):
    """What is raised once the weights of a stack have moved is raised, not tried again in turn on the same batch."""
    models, stacked = [model(0), model(1)], []
    with pytest.raises(error) as caught:
        trained(tmp_path, models, "same", stacked, monkeypatch)
    assert caught.traceback[-1].name == "stepped" and stacked == [2]
    assert [m.ended for m in models] == [1, 0]
