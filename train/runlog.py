"""`log.jsonl`: one JSON object an optimizer step and one an evaluation, readable while the run goes on."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from store.errors import UserError
from train.checkpoint import replace


def finite(value: Any) -> Any:
    """`value` with NaN and infinities as None, since JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` to `path`, atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    partial.write_text(json.dumps(finite(value), indent=2) + "\n", encoding="utf-8")
    replace(partial, path)


class RunLog:
    """Appends to `run_dir/log.jsonl`, and to TensorBoard's events where asked for.

    A resumed run first drops what was logged after its checkpoint, so every step stands there once.
    """

    def __init__(self, run_dir: Path, keep_steps: int, keep_evaluations: int, tensorboard: bool = False) -> None:
        path = run_dir / "log.jsonl"
        kept = _kept(path, keep_steps, keep_evaluations) if keep_steps or keep_evaluations else []
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        replace(partial, path)
        self._file = path.open("a", encoding="utf-8")
        self._board = _board(run_dir) if tensorboard else None

    def step(self, entry: dict[str, Any]) -> None:
        self._write(entry)
        if self._board is not None:
            for name in ("loss", "lr", "grad_norm", "seconds", "wait_seconds"):
                self._board.add_scalar(f"train/{name}", entry[name], entry["step"])

    def evaluation(self, entry: dict[str, Any]) -> None:
        self._write(entry)
        if self._board is not None:
            for split in ("validation", "test"):
                for name, value in entry.get(split, {}).items():
                    self._board.add_scalar(f"{split}/{name}", value, entry["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(finite(entry)) + "\n")
        self._file.flush()


def _kept(path: Path, steps: int, evaluations: int) -> list[str]:
    """The lines of the first `steps` steps and `evaluations` evaluations; a torn last line is dropped."""
    lines: list[str] = []
    if not path.exists():
        return lines
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "loss" in entry:
            steps -= 1
            keep = steps >= 0
        else:
            evaluations -= 1
            keep = evaluations >= 0
        if keep:
            lines.append(line)
    return lines


def _board(run_dir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "tensorboard is not installed: pip install 'activation-pipeline[tensorboard]', or leave --tensorboard out"
        ) from None
    return SummaryWriter(str(run_dir / "tensorboard"))
