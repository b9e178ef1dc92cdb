"""Where else a log goes: each entry once, also after a kill; one line for a package that is not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipeline.store.errors import UserError
from pipeline.train.fit.loop import FitOptions, Training
from pipeline.train.fit.reporters import check_reporters
from tests.pipeline.test_errors import run
from tests.train.test_loop import toy_space, train  # noqa: F401


class Stub:
    """A run of wandb's."""

    runs: dict[str, list[Any]] = {}  # noqa: RUF012

    def __init__(self, **given: Any) -> None:
        self.given = given
        self.told = Stub.runs.setdefault(given["id"], [])

    def log(self, values: dict[str, float], step: int) -> None:
        self.told += [(step, name, value) for name, value in values.items()]

    def finish(self) -> None:
        self.told.append("finished")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> type[Stub]:
    module: Any = ModuleType("wandb")
    module.init = lambda **given: Stub(**given)
    Stub.runs = {}
    monkeypatch.setitem(sys.modules, "wandb", module)
    return Stub


def logged(folder: Path) -> list[Any]:
    """(step, name, value) of the log."""
    out = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        split = next((s for s in ("validation", "test") if s in entry), None)
        names = ("loss", "lr", "grad_norm", "seconds", "wait_seconds")
        values = (
            {f"{split}/{k}": v for k, v in entry[split].items()} if split else {f"train/{k}": entry[k] for k in names}
        )
        out += [(entry["step"], name, pytest.approx(value)) for name, value in values.items() if value is not None]
    return out


class Killed(BaseException):
    pass


def test_what_the_loop_logs_is_told_once(tmp_path, wandb, monkeypatch):
    train(tmp_path / "whole", report_to=("wandb",))
    (told,) = wandb.runs.values()
    assert told == [*logged(tmp_path / "whole"), "finished"]
    wandb.runs.clear()
    real, calls = Training.made, []

    def made(self: Any, *given: Any) -> None:
        real(self, *given)
        calls.append(1)
        if len(calls) == 9:
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Training, "made", made)
        train(tmp_path / "cut", report_to=("wandb",), checkpoint_every=2)
    train(tmp_path / "cut", report_to=("wandb",), checkpoint_every=2)
    (told,) = wandb.runs.values()  # the same run goes on there
    times = ("train/seconds", "train/wait_seconds")  # step 9 was made twice, and took another time
    assert [e for e in told if e != "finished" and e[1] not in times] == [
        e for e in logged(tmp_path / "cut") if e[1] not in times
    ]


def test_tensorboard_takes_the_same(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, report_to=("tensorboard",), tensorboard=True, epochs=1)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {(e.step, tag): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    assert found == {(step, name): pytest.approx(value.expected, rel=1e-5) for step, name, value in logged(tmp_path)}


def test_mlflow_and_wandb_themselves(tmp_path, monkeypatch):
    """Without a network; the libraries are no part of the test environment."""
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    train(tmp_path / "run", report_to=("mlflow", "wandb"), epochs=1)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    known = json.loads((tmp_path / "run" / "reports.json").read_text())["mlflow"]
    client = mlflow.tracking.MlflowClient()
    losses = client.get_metric_history(known, "train/loss")
    assert [(m.step, m.value) for m in losses] == [
        (step, value) for step, name, value in logged(tmp_path / "run") if name == "train/loss"
    ]
    assert client.get_run(known).data.params["lr"] == "0.01"


def test_what_is_not_there_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *given: None)
    for name in ("wandb", "mlflow", "tensorboard"):
        with pytest.raises(UserError, match=rf"activation-pipeline\[{name}\]"):
            check_reporters([name])
        with pytest.raises(UserError, match="not installed"):
            FitOptions(report_to=(name,))
    refused = run("train", "--report-to", "wandbb", "--task", "x.csv", "--model", "x", "--tuner", "probe")
    assert refused.exit_code != 0 and "tensorboard, wandb, mlflow" in refused.stderr
