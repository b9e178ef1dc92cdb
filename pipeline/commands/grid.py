"""The runs of a sweep: every combination of a grid's values, listed variants, or both, each with every seed.

A sweep file is YAML: `grid` (option: values), `runs` (a list of variants, each a mapping of options that may have a
`name`), `seeds`, and options of all runs beside them. Every variant is combined with every point of the grid.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from pipeline.catalog import BASELINES, is_baseline
from pipeline.option_names import field_name, named, option_name
from pipeline.owners import KINDS, for_tuner, having, nearest, options_of, recipe_of
from pipeline.recipe import Recipe, field_names
from pipeline.recipe_file import recipe_values
from pipeline.store.errors import UserError
from pipeline.store.format.digest import digest_json
from pipeline.store.near import near
from pipeline.values import checked_value

# What one sweep has one of: the task and its splits, so that scores can be compared, and where things are.
_FIXED = (
    "model", "task", "store", "data", "text", "text_pair", "image", "label", "columns", "separator", "validation",
    "test", "stratify", "grid", "metric", "out", "overwrite", "device", "tier", "host_memory", "scheduler", "imports",
    "tuners", "split", "skip_bad", "batch_tokens", "tensorboard", "report_to", "live", "objective", "fold",
)  # fmt: skip
_OWN_WORD = {"seed": "--seeds", "tuners": "--tuner"}  # what a sweep has an option of its own for
_LONGEST = 80  # characters of a run folder's name
_HINTS = get_type_hints(Recipe)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, whole ones where both are `int`; `log`: their logarithms are drawn evenly."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Sweep:
    """What is asked for. `grid`: option → values, or a range of them for a search. `variants`: settings of which each
    is combined with the grid's. `tuners`: those of every point that names none. `folds`: parts of the rows, each of
    which is chosen by once."""

    grid: Mapping[str, Sequence[Any] | Range]
    variants: Sequence[Mapping[str, Any]] = ({},)
    tuners: Sequence[str] = ()
    seeds: Sequence[int] = ()
    folds: int | None = None

    @property
    def ranges(self) -> dict[str, Range]:
        """What a search draws from, by option."""
        return {name: values for name, values in self.grid.items() if isinstance(values, Range)}

    def methods(self) -> list[str]:
        """Tuners and baselines that occur, in order."""
        listed = [v["tuner"] for v in self.variants if "tuner" in v]
        others = any("tuner" not in v for v in self.variants) and "tuner" not in self.grid
        asked = self.grid.get("tuner", ())
        own = [] if isinstance(asked, Range) else asked
        return list(dict.fromkeys([*listed, *own, *(self.tuners if others else ())]))


@dataclass(frozen=True)
class Trial:
    """One run. `setting`: what is varied, the seed apart, as plain values; `label` says it in words. `recipe`: that of
    `pipeline train`; of a `baseline`, which trains in the live backbone, the options common to all."""

    name: str
    label: str
    setting: Mapping[str, Any]
    recipe: Recipe
    baseline: str = ""


def read_sweep(path: str | Path) -> tuple[Sweep, dict[str, Any]]:
    """A sweep file's sweep, and the options it gives to all runs. UserError for what is not one."""
    values = named(recipe_values(path), f"sweep {path}")
    grid, listed, seeds = values.pop("grid", {}), values.pop("runs", [{}]), values.pop("seeds", [])
    if not isinstance(grid, dict) or not all((isinstance(v, list) and v) or _is_range(v) for v in grid.values()):
        raise UserError(f"sweep {path}: grid: expected `option: [values]` or `option: low..high` lines")
    if not isinstance(listed, list) or not listed or not all(isinstance(v, dict) for v in listed):
        raise UserError(f"sweep {path}: runs: expected a list of `option: value` mappings")
    if not isinstance(seeds, list) or not all(type(s) is int and s >= 0 for s in seeds):
        raise UserError(f"sweep {path}: seeds: expected a list of whole numbers from 0")
    tuner = values.pop("tuner", None)
    grid = {
        name: _range(name, values) if isinstance(values, str) else values
        for name, values in named(grid, f"sweep {path}: grid").items()
    }
    variants = [named(v, f"sweep {path}: runs") for v in listed]
    return Sweep(grid, variants, [tuner] if tuner else [], seeds), values


def _is_range(text: Any) -> bool:
    return isinstance(text, str) and text.count("..") == 1


def _range(name: str, text: str) -> Range:
    """ "1e-4..1e-2:log" → a range. UserError for an option that takes no numbers, or ends that are none."""
    span, _, how = text.partition(":")
    low, high = (_value(name, end.strip()) for end in span.split(".."))
    if how not in ("", "log"):
        raise UserError(f"--grid {name}={text}: expected LOW..HIGH or LOW..HIGH:log")
    if any(isinstance(end, bool) or not isinstance(end, int | float) for end in (low, high)):
        raise UserError(f"--grid {name}={text}: {name} takes no range of numbers: list its values")
    if not low < high or (how and low <= 0) or not math.isfinite(high):
        raise UserError(
            f"--grid {name}={text}: the first number must be below the second" + ", and above 0" * bool(how)
        )
    return Range(low, high, bool(how))


def parse_grid(words: Sequence[str]) -> dict[str, list[Any] | Range]:
    """ "lr=1e-3,3e-3" → {"lr": [0.001, 0.003]}; values that are lists have + between their parts; "lr=1e-4..1e-2:log"
    is a range. UserError for an option that there is not, or a value it does not take."""
    found: dict[str, list[Any] | Range] = {}
    for word in words:
        name, mark, text = word.partition("=")
        name = field_name(name.strip().removeprefix("--"))
        values = [part.strip() for part in text.split(",") if part.strip()]
        if not mark or not name or not values:
            raise UserError(f"--grid {word}: expected OPTION=VALUE,VALUE, such as lr=1e-3,3e-3")
        if name in found:
            raise UserError(f"--grid: {option_name(name).removeprefix('--')} is given twice: put all its values in one")
        found[name] = _range(name, text) if _is_range(text) else [_value(name, value) for value in values]
    return found


def _value(name: str, text: str) -> Any:
    hint = _hint(name)
    kinds = get_args(hint) or (hint,)
    if type(None) in kinds and text == "none":
        return None
    if any(get_args(kind) for kind in kinds if kind is not type(None)) or get_args(hint)[1:] == (...,):
        return text.split("+")
    value = text if str in kinds else yaml.safe_load(text)
    return checked_value(name, hint, value, "--grid")


def _hint(name: str) -> Any:
    if name in _HINTS:
        return _HINTS[name]
    for kind in KINDS:
        for owner in having(kind, name):
            return options_of(kind, owner)[name][1]
    raise UserError(f"--grid: unknown option {name!r}{nearest(name)}")


def trials(sweep: Sweep, base: Recipe) -> list[Trial]:
    """The runs of `sweep`, each once, in order. `base`: options of all runs; those of tuners are for whoever has them.

    An option that a point's tuner does not have is left out there; UserError where no tuner of the sweep has it, or
    for one that all runs of a sweep have in common.
    """
    _refuse(sweep)
    if sweep.ranges:
        raise UserError(f"--grid: {', '.join(sweep.ranges)} is a range, from which --search draws: give one, or values")
    names = list(sweep.grid)
    listed = [values for values in sweep.grid.values() if not isinstance(values, Range)]
    points = [dict(zip(names, values, strict=True)) for values in itertools.product(*listed)]
    found: dict[str, tuple[str, dict[str, Any], Recipe]] = {}
    for variant, point in itertools.product(sweep.variants, points):
        asked = {k: v for k, v in {**variant, **point}.items() if k not in ("tuner", "name")}
        chosen = point.get("tuner", variant.get("tuner"))
        for tuner in [chosen] if chosen else sweep.tuners:
            own = {k: v for k, v in asked.items() if k in field_names() or _has(tuner, k)}
            setting = {k: checked_value(k, _hint(k), v, "sweep") for k, v in own.items()}
            recipe = _recipe(base, tuner, setting)
            told = point if variant.get("name") else setting  # a name stands for what its variant sets
            words = [variant.get("name") or tuner, *(_words(k, v) for k, v in setting.items() if k in told)]
            same = digest_json([tuner, recipe.to_mapping()])
            found.setdefault(same, (" ".join(words), {"tuner": tuner, **setting}, recipe))
    seeds = list(dict.fromkeys(sweep.seeds)) or [base.seed]
    ordering = seeds[0] if base.order_seed is None else base.order_seed
    if sweep.folds and base.fold:
        raise UserError(f"--folds {sweep.folds}: the runs are cut by it; leave --fold {base.fold} out")
    folds = [f"{i}/{sweep.folds}" for i in range(1, 1 + sweep.folds)] if sweep.folds else [base.fold]
    made = []
    for (label, setting, recipe), seed, fold in itertools.product(found.values(), seeds, folds):
        order = recipe.order_seed if "order_seed" in setting else ordering
        own = replace(recipe, seed=seed, order_seed=None if order == seed else order, fold=fold)
        baseline = setting["tuner"] if is_baseline(setting["tuner"]) else ""
        part = f" f{fold.replace('/', 'of')}" if sweep.folds and fold else ""
        made.append(Trial(f"{label} s{seed}{part}", label, setting, own, baseline))
    return _folders(made)


def _refuse(sweep: Sweep) -> None:
    for tuner in sweep.methods():
        if not is_baseline(tuner):
            try:
                options_of("tuner", tuner)
            except UserError as error:
                raise UserError(f"{error}{near(tuner, BASELINES)}") from None
    if not sweep.methods():
        raise UserError("a sweep needs --tuner NAME, or tuner=NAME,NAME in its grid")
    for name in dict.fromkeys([*sweep.grid, *(k for v in sweep.variants for k in v if k != "name")]):
        if name in _FIXED or name == "seed":
            flag = option_name(name)
            how = f"give {_OWN_WORD[name]}" if name in _OWN_WORD else f"all runs of a sweep have one: give {flag}"
            raise UserError(f"a sweep does not vary {flag.removeprefix('--')}; {how}")
        _hint(name)
        if name not in field_names() and not any(_has(t, name) for t in sweep.methods()):
            owners = ", ".join(n for kind in KINDS for n in having(kind, name))
            raise UserError(f"{name} is an option of {owners}: it would do nothing with {', '.join(sweep.methods())}")


def _has(tuner: str, option: str) -> bool:
    return bool(having("objective", option)) or (not is_baseline(tuner) and option in options_of("tuner", tuner))


def _recipe(base: Recipe, tuner: str, setting: Mapping[str, Any]) -> Recipe:
    """`base` for one tuner with the options of `setting`."""
    if is_baseline(tuner):
        own = replace(base, tuner="probe", tuner_options={})
    else:
        own = for_tuner(base, tuner)
    return recipe_of("train", ("sweep", own.to_mapping()), ("sweep", {k: _plain(v) for k, v in setting.items()}))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _words(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no-{name}"
    text = "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"{name.replace('_', '-')}={text}"


def _folders(made: Sequence[Trial]) -> list[Trial]:
    """`made` with names that are folders' names, each once."""
    taken: set[str] = set()
    out = []
    for trial in made:
        name = re.sub(r"[^\w.+-]+", "-", trial.name.replace("=", "")).strip("-.")
        if len(name) > _LONGEST or name.lower() in taken:
            own = digest_json([trial.baseline, trial.recipe.to_mapping()])[:8]
            name = f"{name[: _LONGEST - 9].rstrip('-')}-{own}"
        taken.add(name.lower())
        out.append(replace(trial, name=name))
    return out
