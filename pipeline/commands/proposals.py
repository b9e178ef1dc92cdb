"""A search over the points of a sweep: Optuna proposes some at a time, all of which are trained in one pass.

Every round's sampler starts from a seed of its own and from all that was found before, and what it proposed is written
down before it is trained. So the same command goes on where it was stopped, with the same proposals.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.commands.grid import Range, Sweep, Trial, trials
from pipeline.commands.train import make_folder
from pipeline.recipe import Recipe
from pipeline.store.errors import UserError
from pipeline.store.format.digest import digest_json
from pipeline.train.fit.log import write_json

FILE = "search.json"
SAMPLERS = ("tpe", "random")


@dataclass(frozen=True)
class Asked:
    """`how`: one of `SAMPLERS`. `trials`: points in all, `round`: of which so many are proposed at a time."""

    how: str
    trials: int = 20
    round: int = 4


class Search:
    """The proposals of a search in `folder`. UserError where Optuna is missing, or the folder holds another search."""

    def __init__(self, sweep: Sweep, base: Recipe, asked: Asked, folder: Path) -> None:
        try:
            import optuna
        except ImportError:
            raise UserError("--search needs Optuna: pip install 'activation-pipeline[search]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna: Any = optuna
        self.base, self.asked, self.path = base, asked, folder / FILE
        if min(asked.trials, asked.round) < 1:
            raise UserError("--trials and --round: at least 1")
        if len(sweep.variants) > 1 or sweep.variants[0]:
            raise UserError("--search draws from a grid; the runs that a sweep file lists are trained without it")
        space: dict[str, Any] = dict(sweep.grid)
        if len(methods := sweep.methods()) > 1:
            space["tuner"] = methods
        if not space:
            raise UserError("--search: there is nothing to draw: give --grid, such as lr=1e-4..1e-2:log")
        self.space = {name: _values(values) for name, values in space.items()}
        self.sweep = replace(sweep, grid={}, tuners=methods)
        trials(replace(self.sweep, grid={k: _ends(v) for k, v in space.items()}), base)  # refuses what is wrong
        told = {k: asdict(v) if isinstance(v, Range) else list(v) for k, v in space.items()}
        self.about = digest_json([asked.how, told, self.sweep.tuners, base.ordering])
        self.points: list[dict[str, Any]] = self._known()

    def _known(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            about, points = found["about"], found["points"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path} is damaged: restore it, or give another --out") from None
        if about != self.about:
            raise UserError(f"{self.path} is of another search, over other values: give another --out")
        return list(points)

    def trials(self, points: Sequence[Mapping[str, Any]] | None = None) -> list[Trial]:
        """The runs of `points`, of all that were proposed where not given."""
        points = self.points if points is None else points
        return trials(replace(self.sweep, variants=points), self.base) if points else []

    def label(self, point: Mapping[str, Any]) -> str:
        """What the table calls a point."""
        return self.trials([point])[0].label

    def propose(self, values: Mapping[str, float | None]) -> bool:
        """Draw the points of the next round; False where all were proposed. `values`: label → how good it is, larger is
        better, None for what has failed."""
        count = len(self.points)
        if count >= self.asked.trials:
            return False
        optuna = self.optuna
        seed = int(digest_json([self.about, count])[:8], 16) % (1 << 31)
        if self.asked.how == "tpe":
            startup = min(10, max(self.asked.round, self.asked.trials // 3))
            sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=startup)
        else:
            sampler = optuna.samplers.RandomSampler(seed=seed)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        spread = {name: self._distribution(values) for name, values in self.space.items()}
        for point in self.points:
            value, state = values.get(self.label(point)), optuna.trial.TrialState
            good = value is not None and math.isfinite(value)
            study.add_trial(
                optuna.trial.create_trial(
                    params={name: _told(point[name]) for name in spread},
                    distributions=spread,
                    value=value if good else None,
                    state=state.COMPLETE if good else state.FAIL,
                )
            )
        for _ in range(min(self.asked.round, self.asked.trials - count)):
            drawn = study.ask(spread).params
            self.points.append({name: _given(drawn[name], self.space[name]) for name in spread})
        make_folder(self.path.parent)
        write_json(self.path, {"about": self.about, "search": asdict(self.asked), "points": self.points})
        return True

    def _distribution(self, values: Range | list[Any]) -> Any:
        made = self.optuna.distributions
        if not isinstance(values, Range):
            return made.CategoricalDistribution([_told(v) for v in values])
        whole = isinstance(values.low, int) and isinstance(values.high, int)
        kind = made.IntDistribution if whole else made.FloatDistribution
        return kind(values.low, values.high, log=values.log)


def _values(values: Any) -> Range | list[Any]:
    return values if isinstance(values, Range) else list(values)


def _ends(values: Any) -> list[Any]:
    return [values.low, values.high] if isinstance(values, Range) else list(values)


def _told(value: Any) -> Any:
    """A value as Optuna takes it: lists as text."""
    return json.dumps(value) if isinstance(value, list | tuple) else value


def _given(drawn: Any, values: Range | list[Any]) -> Any:
    """What was drawn as an option's value: of a range rounded to four digits, of a list the value that is told so."""
    if isinstance(values, Range):
        short = float(f"{drawn:.4g}") if isinstance(drawn, float) else drawn
        return min(max(short, values.low), values.high)
    return next(v for v in values if _told(v) == drawn)
