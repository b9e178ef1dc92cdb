"""The loop: exact resume after any stop, accumulation, best epoch, schedules, one clear line when it goes wrong."""

import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import store
from pipeline.extract.batch import Batch
from pipeline.store.errors import UserError
from pipeline.train.data.store_source import StoreSource, StreamOptions
from pipeline.train.fit import run_files as checkpoint
from pipeline.train.fit.loop import FitOptions, Interrupted, NotFinite, fit
from pipeline.train.fit.schedule import factor
from tests import forks
from tests.train.toys import COLUMNS, STATES, Told, ToyModel, ToySpace, key, targets

SPACE = ToySpace([9] * 12)


@pytest.fixture(autouse=True)
def toy_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "read_block", SPACE.read_block)


def source(ids: Sequence[int] = range(80), batch_size: int = 16, labelled: bool = True) -> StoreSource:
    told = targets([int(sum(map(ord, key(i))) % 2) for i in ids]) if labelled else None
    return StoreSource(SPACE, [key(i) for i in ids], told, STATES, COLUMNS, StreamOptions(batch_size, 1, ahead=0))


def score(predictions: Sequence[Any], labels: Sequence[Any]) -> dict[str, float]:
    accuracy = float(np.mean(np.array(predictions) == np.array(labels)))
    return {"accuracy": accuracy, "average": accuracy}


def scorer() -> Told:
    return Told(score)


def train(run: Path, model: Any = None, train_source: Any = None, **options: Any) -> dict[str, Any]:
    settings = FitOptions(**{"epochs": 3, "lr": 1e-2, "warmup_steps": 2, **options})
    return fit(
        model or ToyModel(),
        train_source or source(),
        source(range(80, 95)),
        source(range(95, 108)),
        settings,
        run,
        scorer,
        progress=False,
    )


def steps(run: Path) -> list[dict[str, Any]]:
    return [e for e in entries(run) if "loss" in e]


def entries(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def course(run: Path) -> list[tuple[Any, ...]]:
    return [(e["step"], e["epoch"], e["loss"], e["lr"], e["grad_norm"]) for e in steps(run)]


class Stopping:
    """A source that raises after some batches, as a kill would end the process there."""

    def __init__(self, inner: StoreSource, after: int, act: Any) -> None:
        self.inner, self.left, self.act, self.n, self.order = inner, after, act, inner.n, inner.order

    def __len__(self) -> int:
        return len(self.inner)

    def epochs(self, first: int, end: int, start: int = 0) -> Iterator[Batch]:
        for batch in self.inner.epochs(first, end, start):
            if self.left == 0:
                self.act()
            self.left -= 1
            yield batch

    def sequential(self) -> Iterator[Batch]:
        return self.inner.sequential()


class Killed(BaseException):
    pass


def kill() -> None:
    raise Killed


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_run_leaves_its_files(tmp_path: Path) -> None:
    result = train(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "metrics.json", "tuner.safetensors"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == result
    logged = steps(tmp_path)
    assert [e["step"] for e in logged] == list(range(1, 16))
    assert [e["epoch"] for e in logged] == [1] * 5 + [2] * 5 + [3] * 5
    assert all({"loss", "lr", "grad_norm", "seconds", "wait_seconds"} <= e.keys() for e in logged)
    assert logged[0]["lr"] == 0 and logged[2]["lr"] == 1e-2  # two steps of warm-up, from zero as in Hugging Face's
    evaluations = [e for e in entries(tmp_path) if "validation" in e]
    assert [e["epoch"] for e in evaluations] == [1, 2, 3]
    best = max(evaluations, key=lambda e: (e["validation"]["average"], -e["epoch"]))
    assert result["best_epoch"] == best["epoch"] and result["validation"] == best["validation"]
    trained = sum(p.numel() for p in ToyModel().parameters() if p.requires_grad)
    assert result["trainable_parameters"] == trained
    assert result["steps"] == 15 and result["stopped"] == "done" and 0 <= result["wait_share"] <= 1
    assert result["seconds_per_epoch"] == pytest.approx(sum(e["seconds"] for e in logged) / 3)
    assert set(result["test"]) == {"accuracy", "average"}


def test_the_best_epoch_is_restored_and_saved(tmp_path: Path) -> None:
    model = ToyModel()
    values = iter([0.4, 0.9, 0.9, 0.1])  # the first of equals wins

    def fake(predictions: Sequence[Any], labels: Sequence[Any]) -> dict[str, float]:
        seen.append({k: v.clone() for k, v in model.trainable_state().items()})
        return {"average": next(values, 0.5)}

    seen: list[dict[str, torch.Tensor]] = []
    result = fit(
        model,
        source(),
        source(range(80, 95)),
        source(range(95, 108)),
        FitOptions(epochs=4),
        tmp_path,
        lambda: Told(fake),
    )
    assert result["best_epoch"] == 2
    saved, info = checkpoint.load(tmp_path / checkpoint.TUNER)
    assert info["epoch"] == 2 and info["validation"] == {"average": 0.9}
    for name, tensor in model.trainable_state().items():
        assert torch.equal(tensor, seen[1][name]) and torch.equal(saved[name], tensor)
        assert torch.equal(seen[4][name], tensor)  # what the test split was scored with


def test_an_undefined_metric_is_never_best(tmp_path: Path) -> None:
    values = iter([math.nan, 0.2, math.nan])
    result = fit(
        ToyModel(), source(), source(range(80, 95)), None, FitOptions(epochs=3), tmp_path,
        lambda: Told(lambda p, y: {"average": next(values)}), progress=False,
    )  # fmt: skip
    assert result["best_epoch"] == 2 and result["test"] is None
    assert entries(tmp_path)[5]["validation"] == {"average": None}


def test_where_no_epoch_has_a_figure_the_last_stands(tmp_path: Path) -> None:
    model = ToyModel()
    result = fit(
        model, source(), source(range(80, 95)), None, FitOptions(epochs=3, patience=1), tmp_path,
        lambda: Told(lambda p, y: {"average": math.nan}), progress=False,
    )  # fmt: skip
    assert result["best_epoch"] == result["epochs"] == 3


@pytest.mark.parametrize("after", [0, 1, 4, 5, 7, 13])
@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "schedule": "cosine", "weight_decay": 0.1}])
def test_a_killed_run_goes_on_exactly(tmp_path: Path, after: int, options: dict[str, Any]) -> None:
    straight = train(tmp_path / "straight", checkpoint_every=2, **options)
    with pytest.raises(Killed):
        train(tmp_path / "killed", train_source=Stopping(source(), after, kill), checkpoint_every=2, **options)
    with (tmp_path / "killed" / "log.jsonl").open("a") as log:
        log.write('{"step": 99, "lo')  # a torn line
    # Another seed of the fresh model shows that nothing of it is used, nor of the random state around the call.
    torch.manual_seed(123)
    resumed = train(tmp_path / "killed", model=ToyModel(seed=5 if after > 4 else 0), checkpoint_every=2, **options)
    assert course(tmp_path / "killed") == course(tmp_path / "straight")
    for name in ("best_epoch", "validation", "test", "steps", "epochs"):
        assert resumed[name] == straight[name]
    a, b = (checkpoint.load(tmp_path / run / checkpoint.TUNER)[0] for run in ("straight", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("after", [0, 3, 4, 9])
def test_ctrl_c_leaves_a_run_that_can_be_resumed(tmp_path: Path, after: int) -> None:
    train(tmp_path / "straight")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=rf"interrupted at step {after + 1} of 15.*can be resumed") as caught:
        train(tmp_path / "cut", train_source=Stopping(source(), after, interrupt))
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(steps(tmp_path / "cut")) == after + 1
    train(tmp_path / "cut", model=ToyModel(seed=9))
    assert course(tmp_path / "cut") == course(tmp_path / "straight")


@forks.needed
def test_a_real_kill(tmp_path: Path) -> None:
    """SIGKILL of another process, then resume here."""

    def work() -> int:
        stopping = Stopping(source(), 8, lambda: os.kill(os.getpid(), signal.SIGKILL))
        train(tmp_path / "cut", train_source=stopping, checkpoint_every=3)
        return 0

    assert forks.ended(forks.begun(work)) == -signal.SIGKILL
    train(tmp_path / "cut", checkpoint_every=3)
    train(tmp_path / "straight", checkpoint_every=3)
    assert course(tmp_path / "cut") == course(tmp_path / "straight")


def test_resuming_with_other_options_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, train_source=Stopping(source(), 3, kill), checkpoint_every=2)
    with pytest.raises(UserError, match=r"unfinished run with lr 0.01, now 0.02"):
        train(tmp_path, lr=2e-2)
    with pytest.raises(UserError, match="samples 80, now 40"):
        train(tmp_path, train_source=source(range(40)))
    train(tmp_path, checkpoint_every=7, patience=9)


def test_dropout_depends_on_seed_and_step_only(tmp_path: Path) -> None:
    train(tmp_path / "a")
    torch.manual_seed(99)
    train(tmp_path / "b")
    train(tmp_path / "c", seed=1)
    assert course(tmp_path / "a") == course(tmp_path / "b")
    assert course(tmp_path / "a")[0] != course(tmp_path / "c")[0]


def test_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    model = ToyModel()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train(tmp_path, model=model)
    assert torch.equal(before, torch.get_rng_state())


def test_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    """Batches of 8, two a step, against batches of 16; the last step of 80 + 3 samples has batches of unequal size."""
    ids = range(83)
    for name, size, many in (("large", 16, 1), ("small", 8, 2)):
        model = ToyModel()
        model.body[2].p = 0.0
        told = targets([i % 2 for i in ids])
        whole = StoreSource(ToySpace([9] * 12), [key(i) for i in ids], told, STATES, (), StreamOptions(size, 1, 99))
        train(tmp_path / name, model=model, train_source=whole, accumulate=many)
    large, small = steps(tmp_path / "large"), steps(tmp_path / "small")
    assert len(large) == len(small) == 18
    for a, b in zip(large, small, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_early_stop_max_steps_and_eval_every(tmp_path: Path) -> None:
    values = iter([0.5, 0.4, 0.3, 0.9, 0.9, 0.9])
    result = fit(
        ToyModel(), source(), source(range(80, 95)), None, FitOptions(epochs=9, patience=2), tmp_path / "a",
        lambda: Told(lambda p, y: {"average": next(values)}), progress=False,
    )  # fmt: skip
    assert (result["stopped"], result["epochs"], result["best_epoch"]) == ("patience", 3, 1)
    result = train(tmp_path / "b", max_steps=7, epochs=9)
    assert (result["stopped"], result["steps"], result["epochs"]) == ("max_steps", 7, 2)
    train(tmp_path / "c", eval_every=2)
    assert [e["epoch"] for e in entries(tmp_path / "c") if "validation" in e] == [2, 3]


def test_without_validation_the_last_epoch_counts(tmp_path: Path) -> None:
    result = fit(ToyModel(), source(), None, None, FitOptions(epochs=2), tmp_path, scorer, progress=False)
    assert result["best_epoch"] == 2 and result["validation"] is None
    assert (tmp_path / checkpoint.TUNER).exists()


def test_clipping_logs_the_norm_before(tmp_path: Path) -> None:
    train(tmp_path / "free", clip=None)
    train(tmp_path / "tight", clip=1e-3)
    assert steps(tmp_path / "free")[0]["grad_norm"] == steps(tmp_path / "tight")[0]["grad_norm"] > 1e-3


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_trains_and_resumes(tmp_path: Path, precision: str) -> None:
    train(tmp_path / "straight", precision=precision)
    with pytest.raises(Killed):
        train(tmp_path / "cut", train_source=Stopping(source(), 7, kill), precision=precision, checkpoint_every=3)
    train(tmp_path / "cut", precision=precision, checkpoint_every=3)
    # checkpoint_every may differ; every step is the same
    assert course(tmp_path / "cut") == course(tmp_path / "straight")


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path: Path) -> None:
    with pytest.raises(NotFinite, match=r"loss is nan at step 7 \(epoch 2, lr .*smaller lr than 0.01") as caught:
        train(tmp_path, model=ToyModel(poison=7))
    assert "\n" not in str(caught.value)
    assert len(steps(tmp_path)) == 6
    train(tmp_path, lr=1e-3)  # the way is free for the advice


def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path) -> None:
    class Steep(ToyModel):
        def loss(self, batch: Batch) -> torch.Tensor:
            return super().loss(batch) + torch.sqrt(self.norm.bias.sum() * 0)

    with pytest.raises(NotFinite, match="gradient's norm is nan at step 1"):
        train(tmp_path, model=Steep())


def test_nothing_to_train_or_to_score_is_said(tmp_path: Path) -> None:
    frozen = ToyModel()
    frozen.requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameters"):
        train(tmp_path, model=frozen)
    unlabelled = source(range(5), labelled=False)
    with pytest.raises(UserError, match="no labels"):
        fit(ToyModel(), source(), unlabelled, None, FitOptions(epochs=1), tmp_path, scorer, progress=False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0}, {"lr": 0}, {"lr": math.nan}, {"weight_decay": -1}, {"betas": (0.9, 1.0)}, {"eps": 0},
        {"schedule": "step"}, {"warmup_steps": -1}, {"warmup_ratio": 1.5}, {"clip": -1}, {"accumulate": 0},
        {"precision": "fp8"}, {"seed": -1}, {"patience": 0}, {"eval_every": 0}, {"max_steps": 0},
        {"checkpoint_every": 0},
    ],
)  # fmt: skip
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        FitOptions(**wrong)


def test_two_warm_ups_are_one_too_many() -> None:
    with pytest.raises(UserError, match="warmup_steps and warmup_ratio"):
        FitOptions(warmup_steps=1, warmup_ratio=0.1)


@pytest.mark.parametrize("warmup", [0, 3, 10, 50])
def test_schedules_are_those_of_the_field(warmup: int) -> None:
    """Also a warm-up longer than the run: LST's 500 steps are all of RTE's training."""
    from transformers import get_scheduler

    for ours, theirs in (("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        reference = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=20)
        at = factor(ours, warmup, 20)
        for step in range(20):
            assert at(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
            optimizer.step()
            reference.step()


def test_tensorboard_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"activation-pipeline\[tensorboard\]"):
        train(tmp_path, tensorboard=True)
