"""Successive halving (Jamieson and Talwalkar, 2016): of a sweep's settings the worst stop early.

With a factor η and runs of E epochs, rungs lie after E/η, E/η², … epochs. At each, the best 1/η of the settings go on,
by the mean over their seeds of the best validation figure so far. All runs follow the schedule of all E epochs, so that
one that goes on is what it would be alone, and one that stops is the beginning of that.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.store.errors import UserError
from pipeline.train.fit.log import write_json
from pipeline.train.fit.loop import Training


class Halving:
    """`labels`: the setting of each run of a pass; `settings`: how many there were at first. What was decided is
    written to `file`, so that a sweep which was stopped while its losers ended goes by it."""

    def __init__(
        self, factor: int, labels: Mapping[Training, str], settings: int, epochs: int, file: Path | None = None
    ) -> None:
        self.factor, self.labels, self.file = factor, labels, file
        self.losers: dict[str, list[str]] = {}
        if file is not None and file.is_file():
            self.losers = _decided(file)["losers"]
        count = 0
        while factor ** (count + 1) <= epochs and math.ceil(settings / factor**count) > 1:
            count += 1
        # epoch → how many settings go on
        self.rungs = {
            epochs // factor ** (count - k): max(1, math.ceil(settings / factor ** (k + 1))) for k in range(count)
        }

    def __call__(self, runs: Sequence[Training]) -> list[Training]:
        """Those of `runs` that are to stop here. None before all of them stand at a rung."""
        if not runs:
            return []
        places = {run.place for run in runs}
        epoch, batch = min(places)
        if len(places) > 1 or batch or epoch not in self.rungs:
            return []
        groups: dict[str, list[Training]] = {}
        for run in runs:
            groups.setdefault(self.labels[run], []).append(run)
        if str(epoch) not in self.losers:
            ranked = sorted(groups, key=lambda label: _value(groups[label]), reverse=True)
            self.losers[str(epoch)] = ranked[self.rungs[epoch] :]
            if self.file is not None:
                write_json(self.file, {"factor": self.factor, "losers": self.losers})
        return [run for label in self.losers[str(epoch)] for run in groups.get(label, ())]


def _value(runs: Sequence[Training]) -> float:
    """Larger for the better setting; what has no figure is the worst."""
    values = [run.scorer().value(run.state.best) if run.state.best else math.nan for run in runs]
    return -math.inf if any(math.isnan(v) for v in values) else statistics.mean(values)


def _decided(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if found["factor"] and found["losers"] is not None:
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{file} is damaged: restore it, or give another --out")


def refuse_other_factor(factor: int, file: Path) -> None:
    """UserError where the losers in `file` were found by another factor."""
    if file.is_file() and (other := _decided(file)["factor"]) != factor:
        raise UserError(
            f"--halving {factor}: {file.parent} holds a sweep of --halving {other}; give that, or another --out"
        )


def refuse_halving(factor: int, passes: int, validated: bool, epochs: set[int]) -> None:
    """UserError, before anything is trained, where halving could not judge."""
    if factor < 2:
        raise UserError(f"--halving {factor}: a factor from 2 on")
    if passes > 1:
        raise UserError(
            "--halving compares runs that see the same samples in the same batches: leave --folds, and options of the "
            "batches and their order, out of this sweep"
        )
    if not validated:
        raise UserError("--halving: there is no validation split to judge by")
    if len(epochs) > 1:
        raise UserError("--halving: runs of unlike length cannot be compared on the way: give all the same --epochs")
