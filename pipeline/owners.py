"""Options belong to who reads them: those of a tuner and of an objective are the fields of its config dataclass, also
in a module of the user's. Recipes are made here: each name goes to its owner, and one that would do nothing is refused,
for whoever gives it would take the result for that of what they asked.

What is given may be flat (`reduction: 4`) or named by its owner (`tuner_options: {reduction: 4}`).
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from functools import cache
from typing import Any, get_type_hints

from pipeline.extract.options import about
from pipeline.extract.plugins import import_modules
from pipeline.jobs.slots import SlotRecipe, tuners_in
from pipeline.option_names import named, option_name
from pipeline.recipe import Recipe, common_value, field_names
from pipeline.store.errors import UserError
from pipeline.train.configs import TUNERS, TunerConfig
from pipeline.train.objective_configs import OBJECTIVES
from pipeline.values import checked_value

KINDS = ("tuner", "objective")
_OURS: dict[str, Mapping[str, type[Any]]] = {"tuner": TUNERS, "objective": OBJECTIVES}
# What commands take beside the recipe's options: an option of an owner is not spelled so.
TAKEN = {"json", "recipe", "help", "budget", "memory", "tuners", "seeds", "preset", "csv", "for", "import",
         "quiet", "verbose"}  # fmt: skip


@dataclass(frozen=True)
class Owned:
    """An option of those chosen. `owners`: the names of those of them that have it; `field` and `hint` are the first
    one's; `flag` is its spelling on the command line."""

    kind: str
    owners: tuple[str, ...]
    field: Field[Any]
    hint: Any
    flag: str

    @property
    def name(self) -> str:
        return self.field.name

    @property
    def choices(self) -> tuple[str, ...]:
        """What any of the owners takes; () where one takes anything."""
        each = [about(options_of(self.kind, owner)[self.name][0]).choices for owner in self.owners]
        return tuple(dict.fromkeys(choice for choices in each for choice in choices)) if all(each) else ()


@cache
def _options(config: type[Any]) -> dict[str, tuple[Field[Any], Any]]:
    hints = get_type_hints(config)
    return {f.name: (f, hints[f.name]) for f in fields(config)}


def options_of(kind: str, name: str) -> dict[str, tuple[Field[Any], Any]]:
    """The options of a tuner or objective, also of an installed plug-in: name → field, type. UserError for an unknown
    name."""
    if name in _OURS[kind]:
        ours: Any = _OURS[kind][name]
        return _options(ours)
    from pipeline.train import objectives, tuners  # these load torch, which a list of ours does without

    cls: Any = tuners.tuner_class(name) if kind == "tuner" else objectives.objective_class(name)
    return _options(cls.config_class)


def names_of(kind: str) -> list[str]:
    """Ours, and those that modules of the user's have registered by now."""
    register: Any = sys.modules.get(f"pipeline.train.{kind}s")
    more = [] if register is None else getattr(register, f"{kind}_names")()
    return list(dict.fromkeys([*_OURS[kind], *more]))


def having(kind: str, option: str, names: Sequence[str] | None = None) -> list[str]:
    """Those of `names` (all there are where None) that have the option."""
    return [n for n in (names_of(kind) if names is None else names) if option in options_of(kind, n)]


def owned(tuners: Sequence[str], objective: str | None, extraction: bool = False) -> list[Owned]:
    """The options of the chosen tuners and of the objective (of any, where none is named), each once. `extraction`:
    only those that extraction needs."""
    found: list[Owned] = []
    taken = {n.replace("_", "-") for n in field_names()} | TAKEN
    for kind, names in (("tuner", tuners), ("objective", names_of("objective") if objective is None else [objective])):
        own: dict[str, Owned] = {}
        for name in names:
            for option, (field, hint) in options_of(kind, name).items():
                if option not in own and not (extraction and not about(field).extraction):
                    flag = option.replace("_", "-")
                    flag = f"--{kind}-{flag}" if flag in taken else f"--{flag}"
                    own[option] = Owned(kind, tuple(having(kind, option, names)), field, hint, flag)
        taken |= {o.flag.removeprefix("--") for o in own.values()}
        found += own.values()
    return found


def refusal(options: Sequence[str], chosen: Sequence[str]) -> str:
    """Which options are not those of the `chosen`, and whose they are, as a sentence; "" where nobody has them."""
    said, own = [], []
    for option in options:
        names = [name for kind in KINDS for name in having(kind, option)]
        if names and set(names) & set(chosen):
            own.append(f"{option_name(option)} is for training, extraction does not depend on it")
        elif names:
            said.append(f"{option_name(option)} is an option of {', '.join(names)}")
    if said:
        own.append(f"{'; '.join(said)}: it would do nothing with {', '.join(chosen) or 'these methods'}")
    return "; ".join(own)


def recipe_of(
    command: str,
    *sources: tuple[str, Mapping[Any, Any]],
    tuners: Sequence[str] | None = None,
    record: bool = False,
) -> Recipe:
    """The recipe that `sources` give: pairs of a place, for messages, and values, of which the later ones win.

    `command`: "extract" is for the tuners of --for, and lets be what only training takes; any other is for --tuner, or
    `tuners`. `record`: of a finished run, whose options of others, which earlier versions took, are left out. Raises
    UserError for an unknown name, naming the nearest; for a value of another type; for an option of another tuner or
    objective, naming whose it is.
    """
    common: dict[str, Any] = {}
    own: list[tuple[str, str, Any, str]] = []  # kind ("" where not said), option, value, where
    for where, values in sources:
        for name, value in named(values, where).items():
            kind = name.removesuffix("_options")
            if kind in KINDS and kind != name:
                nested = named(common_value(name, value, where), where)
                if twice := [n for n in values if str(n).replace("-", "_") in nested.keys() - field_names()]:
                    raise UserError(
                        f"{where}: {option_name(twice[0])} is given twice, by itself and in {name}: keep one"
                    )
                own += [(kind, option, v, where) for option, v in nested.items()]
            elif name in field_names():
                common[name] = common_value(name, value, where)
            else:
                own.append(("", name, value, where))
    recipe = Recipe(**common)
    import_modules(recipe.imports)
    if tuners is None:
        tuners = tuners_in(recipe, command == "extract")
    for name in tuners:
        options_of("tuner", name)  # of an installed plug-in, which is imported now
    if recipe.objective:
        options_of("objective", recipe.objective)
    chooser = _Chooser(tuners, recipe.objective, command == "extract")
    for kind, option, value, where in own:
        chooser.take(option, value, where, kind)
    if chooser.others and not record:
        raise UserError(refusal(chooser.others, [*tuners, *([recipe.objective] if recipe.objective else [])]))
    return replace(recipe, tuner_options=chooser.found["tuner"], objective_options=chooser.found["objective"])


class _Chooser:
    """Gives options to their owners among the tuners and the objective, into `found`; `others`: options of others."""

    def __init__(self, tuners: Sequence[str], objective: str | None, extraction: bool) -> None:
        self.extraction = extraction
        self.chosen = {"tuner": tuners, "objective": names_of("objective") if objective is None else [objective]}
        self.open = objective is None  # which objective it is the data will tell
        self.found: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        self.others: list[str] = []

    def take(self, option: str, value: Any, where: str, only: str) -> None:
        """One option; `only`: the kind of its owner, "" where that is not said."""
        owners = {kind: having(kind, option) for kind in KINDS if only in ("", kind)}
        if not any(owners.values()):
            raise UserError(f"{where}: unknown option {option!r}{nearest(option)}")
        fields = [options_of(kind, n)[option][0] for kind, names in owners.items() for n in names]
        usual = any(value == f.default for f in fields)
        # Recipes of earlier versions write out options of every tuner and objective.
        nothing = value is None or value is False or value in ((), []) or (usual and bool(only))
        for kind in owners:
            names = [n for n in self.chosen[kind] if n in owners[kind]]
            # Of several owners that differ in their defaults one means something by each.
            said = any(value != f.default for f in fields)
            if not names or (kind == "objective" and self.open and not said and not only):
                continue
            hint = options_of(kind, names[0])[option][1]
            if value is None or value in ((), []):
                self.found[kind].pop(option, None)
            elif not self.extraction or any(about(options_of(kind, n)[option][0]).extraction for n in names):
                self.found[kind][option] = checked_value(option, hint, value, where)
            return
        nothing = nothing or (usual and self.open and bool(owners.get("objective")))
        if not nothing and (not self.extraction or any(about(f).extraction for f in fields)):
            self.others.append(option)


def nearest(option: str) -> str:
    """ "; did you mean …?" of the option called most like it, or nothing."""
    known = [*field_names(), *(o for kind in KINDS for n in names_of(kind) for o in options_of(kind, n))]
    near = difflib.get_close_matches(option, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def config_of(recipe: Recipe, name: str, several: bool = False) -> TunerConfig:
    """The config of tuner `name`. `several`: the options are for several tuners, of which this one takes what it has;
    and `layers` are then not for those that read a single one. Tuners of several slots take what they have, too."""
    from pipeline.train.tuners import tuner_class, tuner_config

    options = dict(recipe.tuner_options)
    if several or isinstance(recipe, SlotRecipe):
        options = {k: v for k, v in options.items() if k in options_of("tuner", name)}
    if several and not tuner_class(name).text_head:
        options.pop("layers", None)
    return tuner_config(name, options)


def for_tuner(recipe: Recipe, name: str) -> Recipe:
    """`recipe` for one tuner of several, or for SLOT=NAME,…: the options of the others left out."""
    chosen = replace(recipe, tuner=name)
    own = {k: v for k, v in recipe.tuner_options.items() if having("tuner", k, tuners_in(chosen))}
    return replace(chosen, tuner_options=own)
