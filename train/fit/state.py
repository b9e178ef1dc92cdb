"""`State`: where a run stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.store.errors import UserError

# Options that may differ when a run is resumed: they change no step.
_FREE = {"patience", "checkpoint_every", "tensorboard", "report_to"}
# Digests, which say nothing to a reader: what has changed instead.
_CONTENT = {
    "order": "an order of other blocks: the store's segments, --window or --group-by-length have",
    "rows": "other rows or labels: the task's table has",
}


@dataclass
class State:
    """Goes to the checkpoint as JSON. `epoch`, `batch`, `step` count from 0 and are the next to do; `best_epoch` counts
    from 1. `seconds` and `wait_seconds` are those of all steps so far, evaluation and checkpoints apart. `log`: size
    and digest of what was logged so far."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    evaluations: int = 0
    since_best: int = 0
    best_epoch: int | None = None
    best: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    wait_seconds: float = 0.0
    stopped: str | None = None
    scaler: dict[str, Any] = field(default_factory=dict)
    log: dict[str, Any] = field(default_factory=dict)


def refuse_other_run(saved: Mapping[str, Any], now: Mapping[str, Any], run_dir: Path) -> None:
    """Raises UserError naming what differs between the unfinished run in `run_dir` and the one asked for `now`. Under
    `chosen` stand the options of tuners and objectives."""
    for name, value in now.items():
        before = saved.get(name)
        if name == "chosen":
            for other, was, is_now in other_options(before or {}, value):
                raise _other(other, was, is_now, run_dir)
        elif name in _CONTENT and before != value:
            raise UserError(
                f"{run_dir} holds an unfinished run over {_CONTENT[name]} changed since; choose another --out"
            )
        elif name not in _FREE and before != value:
            raise _other(name, before, value, run_dir)


def other_options(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Options of tuners and objectives that are `now` others than those `saved`: the name, before and now."""
    for name, value in now.items():
        before = saved.get(name, value)  # what an earlier version did not write down is taken as it is now
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            yield from other_options(before, value)
        elif before != value:
            yield name, before, value


def _other(name: str, before: Any, now: Any, run_dir: Path) -> UserError:
    return UserError(
        f"{run_dir} holds an unfinished run with {name} {before!r}, now {now!r}: "
        "give the same to resume it, or choose another --out"
    )
