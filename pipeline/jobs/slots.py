"""Recipes of several backbones: `--model image=resnet50,text=minilm` names the slots of the task, a backbone each.

Options that are a slot's own are written in the same way (`--tuner image=unipt,text=sherl`); a plain value is for
every slot. `parts_of` gives the recipe of each slot, which is one of a single backbone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pipeline.option_names import option_name
from pipeline.recipe import UNSPOKEN, Recipe
from pipeline.store.errors import UserError

PER_SLOT = ("model", "tuner", "space", "text", "text_pair", "image")
_SLOT = r"[a-z][a-z0-9_]{0,31}"
_NAMED = re.compile(f"({_SLOT})=(.+)", re.DOTALL)


@dataclass
class SlotRecipe(Recipe):
    """What a recipe of several backbones, `whole`, says of one `slot`."""

    slot: str = field(default="", metadata=UNSPOKEN)
    whole: Recipe = field(default_factory=Recipe, metadata=UNSPOKEN)

    def joint(self) -> Recipe:
        """The recipe of all slots, with what has been found out here of options that all share."""
        shared = [f.name for f in fields(Recipe) if f.name not in PER_SLOT]
        return replace(self.whole, **{n: getattr(self, n) for n in shared if getattr(self.whole, n) is None})


def named_parts(text: str | None, option: str, slots: Sequence[str] = ()) -> dict[str, str]:
    """ "a=x,b=y" → {"a": "x", "b": "y"}; {} for a plain value, as "a=x" is unless a is one of `slots`. UserError for
    what is half of each."""
    words = (text or "").split(",")
    parts = [_NAMED.fullmatch(word) for word in words]
    if parts[0] is None or (len(words) < 2 and parts[0][1] not in slots):
        return {}
    found: dict[str, str] = {}
    for part, word in zip(parts, words, strict=True):
        if part is None:
            raise UserError(f"{option_name(option)} {text}: expected SLOT=VALUE for each slot, not {word!r}")
        if part[1] in found:
            raise UserError(f"{option_name(option)} {text}: slot {part[1]} is given twice")
        found[part[1]] = part[2]
    return found


def slots_of(recipe: Recipe) -> tuple[str, ...]:
    """The slots that --model names; () for a single backbone."""
    return tuple(named_parts(recipe.model, "model"))


def slot_of(recipe: Recipe) -> str:
    """The slot that the recipe is of; "" where there is a single backbone."""
    return recipe.slot if isinstance(recipe, SlotRecipe) else ""


def slot_and_name(method: str) -> tuple[str, str]:
    """A method of --for: "text=sherl" is of one slot, "sherl" ("", "sherl") of all."""
    found = _NAMED.fullmatch(method)
    return (found[1], found[2]) if found else ("", method)


def together(recipe: SlotRecipe) -> str:
    """The column of pairs whose values keep rows in one split: that of the images, else that of the first slot; ""
    where the recipe names none, or leaves a slot's to be found, which may be that of the images."""
    slots = slots_of(recipe.whole)
    for option in ("image", "text"):
        if given := getattr(recipe.whole, option):
            named = named_parts(given, option, slots)
            if option == "text" and named and len(named) < len(slots):
                return ""
            return next((named[slot] for slot in slots if slot in named), given)
    return ""


def tuners_in(recipe: Recipe, extraction: bool = False) -> list[str]:
    """The names of the tuners of --tuner, or, for an `extraction`, of --for, over all slots."""
    if extraction:
        return list(dict.fromkeys(slot_and_name(method)[1] for method in recipe.tuners))
    return list(dict.fromkeys(named_parts(recipe.tuner, "tuner", slots_of(recipe)).values())) or [recipe.tuner]


def names_in(method: str) -> list[str]:
    """What a method of `compare` is made of: "image=probe+text=lora" names a tuner or baseline a slot, with + between
    for there are commas between methods; a plain name is for every slot."""
    return [slot_and_name(part)[1] for part in method.split("+")]


def by_slot(recipe: Recipe, method: str) -> dict[str, str]:
    """Slot → its tuner or baseline in a method of `compare`; {"": `method`} for a single backbone."""
    parts = parts_of(replace(recipe, tuner=method.replace("+", ","), tuners=()))
    return {slot: part.tuner for slot, part in parts.items()}


def parts_of(recipe: Recipe) -> dict[str, Recipe]:
    """Slot → its recipe; {"": recipe} for a single backbone. UserError for an option that names another slot."""
    slots = slots_of(recipe)
    if not slots:
        _refuse_slots_of(recipe, ("tuner", "space"))
        return {"": recipe}
    if (recipe.views or 1) > 1:
        raise UserError("--views: augmented views are for a single backbone; leave it out with several")
    common = {f.name: getattr(recipe, f.name) for f in fields(Recipe)}
    own: dict[str, dict[str, Any]] = {slot: {} for slot in slots}
    for option in PER_SLOT:
        given = getattr(recipe, option)
        named = named_parts(given, option, slots)
        _refuse_others(option_name(option), given, list(named), slots)
        if option == "tuner" and named and (lack := [slot for slot in slots if slot not in named]):
            raise UserError(f"--tuner {given}: name the tuner of slot {lack[0]} too")
        for slot in slots:
            own[slot][option] = named.get(slot) if named else given
    methods = [slot_and_name(method) for method in recipe.tuners]
    _refuse_others("--for", ",".join(recipe.tuners), [slot for slot, _ in methods if slot], slots)
    for slot in slots:
        own[slot]["tuners"] = tuple(name for of, name in methods if of in ("", slot))
    return {slot: SlotRecipe(**{**common, **own[slot]}, slot=slot, whole=recipe) for slot in slots}


def tasks_of(recipe: Recipe) -> list[str]:
    """The tasks that --task names, with commas between where there are several."""
    names = [name.strip() for name in recipe.task.split(",")]
    return names if len(names) > 1 and all(names) and not Path(recipe.task).exists() else [recipe.task]


def refuse_tasks(recipe: Recipe, what: str) -> None:
    """UserError where the recipe is of several tasks, which `what` does not take."""
    if len(tasks_of(recipe)) > 1:
        raise UserError(f"{what} takes one task a run: give one of {recipe.task} to --task")


def refuse_slots(recipe: Recipe, what: str) -> None:
    """UserError where the recipe is of several backbones or tasks, which `what` does not take."""
    refuse_tasks(recipe, what)
    if slots := slots_of(recipe):
        raise UserError(
            f"{what} takes one backbone a run: give --model the one of slot {slots[0]}, or of another, alone"
        )
    _refuse_slots_of(recipe, ("tuner", "space"))


def _refuse_slots_of(recipe: Recipe, options: Sequence[str]) -> None:
    for option in options:
        if named_parts(given := getattr(recipe, option), option):
            raise UserError(
                f"{option_name(option)} {given} names slots, and --model does not: --model SLOT=NAME,SLOT=NAME"
            )


def _refuse_others(flag: str, given: str, named: Sequence[str], slots: Sequence[str]) -> None:
    if other := [slot for slot in named if slot not in slots]:
        raise UserError(f"{flag} {given}: --model has no slot {other[0]}; it has {', '.join(slots)}")
