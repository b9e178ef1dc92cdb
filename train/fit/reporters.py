"""Where else a run's log goes: TensorBoard, Weights & Biases, MLflow. Each is an optional package.

What they are told is what stands in `log.jsonl`: `train/loss`, `train/lr`, … a step, `validation/…` and `test/…` an
evaluation. Where they send it is theirs to know: WANDB_MODE=offline keeps it in the run's folder, MLFLOW_TRACKING_URI
names a server or a folder. A resumed run goes on in the run that it began there, whose name stands in `reports.json`.
"""

from __future__ import annotations

import importlib.util
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from pipeline.store.errors import UserError

PROJECT = "activation-pipeline"  # what runs stand under where such a service has projects or experiments
REPORTERS = ("tensorboard", "wandb", "mlflow")
KEPT = "reports.json"
_OPENING = Lock()  # the runs of a sweep begin at once, and one of them makes the project


class Reporter(Protocol):
    """Takes numbers by name."""

    def tell(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_reporters(names: Sequence[str]) -> None:
    """UserError, one line, for a name that is none, or whose package is not installed."""
    for name in names:
        if name not in REPORTERS:
            raise UserError(f"--report-to: one or more of {', '.join(REPORTERS)}, not {name!r}")
        try:
            found = importlib.util.find_spec(name) is not None
        except ValueError:  # of a module that was put in place by hand
            found = True
        if not found:
            raise UserError(
                f"--report-to {name}: it is not installed: pip install 'activation-pipeline[{name}]', or leave it out"
            )


def open_reporters(names: Sequence[str], run_dir: Path, about: Mapping[str, Any], resumed: bool) -> list[Reporter]:
    """A reporter each. `about`: the run's options. `resumed`: whether the run goes on with what it has told before."""
    kept = _kept(run_dir) if resumed else {}
    about = {name: value for name, value in about.items() if isinstance(value, str | int | float | bool)}
    made: list[Reporter] = []
    with _OPENING:
        for name in dict.fromkeys(names):
            if name == "tensorboard":
                made.append(_TensorBoard(run_dir))
            elif name == "wandb":
                kept.setdefault(name, uuid.uuid4().hex[:8])
                made.append(_Wandb(run_dir, about, kept[name]))
            else:
                mlflow = _MlFlow(run_dir, about, kept.get(name))
                kept[name] = mlflow.run
                made.append(mlflow)
    if kept:
        (run_dir / KEPT).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return made


def _kept(run_dir: Path) -> dict[str, str]:
    try:
        return dict(json.loads((run_dir / KEPT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}  # it begins anew there


class _TensorBoard:
    def __init__(self, run_dir: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--report-to tensorboard: pip install 'activation-pipeline[tensorboard]'") from None
        self.board: Any = SummaryWriter(str(run_dir / "tensorboard"))

    def tell(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.board.close()


class _Wandb:
    """The runs of a sweep are runs of their own beside each other."""

    def __init__(self, run_dir: Path, about: Mapping[str, Any], known: str) -> None:
        import wandb

        own: dict[str, Any] = {
            "project": PROJECT,
            "name": run_dir.name,
            "id": known,
            "resume": "allow",
            "reinit": "create_new",
        }
        self.run: Any = wandb.init(dir=str(run_dir), config=dict(about), **own)

    def tell(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class _MlFlow:
    """By its client, which knows no current run, of which there could be one only."""

    def __init__(self, run_dir: Path, about: Mapping[str, Any], known: str | None) -> None:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self.metric: Any = Metric
        self.client: Any = MlflowClient()
        if known is None:
            found = self.client.get_experiment_by_name(PROJECT)
            place = self.client.create_experiment(PROJECT) if found is None else found.experiment_id
            known = self.client.create_run(place, run_name=run_dir.name).info.run_id
            for name, value in about.items():
                self.client.log_param(known, name, value)
        self.run: str = str(known)

    def tell(self, step: int, values: Mapping[str, float]) -> None:
        import time

        now = int(1000 * time.time())
        self.client.log_batch(self.run, metrics=[self.metric(name, v, now, step) for name, v in values.items()])

    def close(self) -> None:
        self.client.set_terminated(self.run)
