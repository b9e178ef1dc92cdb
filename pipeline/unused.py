"""Options that would do nothing are refused: whoever gives one would take the result for that of what they asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

from pipeline.extract.backbones import Family
from pipeline.recipe import Recipe, option_name
from pipeline.store.errors import UserError
from pipeline.train.tuners import tuner_class, tuner_names

_FIELDS = {f.name: f for f in fields(Recipe)}
# What a recipe says of texts and of pictures without changing anything: also what recipes of runs write out.
TEXT_OPTIONS: dict[str, tuple[Any, ...]] = {
    "max_length": (None, 128), "truncation_side": (None, "right"), "prompt": (None,),
}  # fmt: skip
PICTURE_OPTIONS: dict[str, tuple[Any, ...]] = {
    "image_size": (None,), "views": (None, 1), "view_seed": (None, 0), "skip_bad": (False,),
}  # fmt: skip
STREAM_OPTIONS = (
    "model", "task", "store", "data", "text", "text_pair", "label", "separator", "objective", "validation", "test",
    "limit", "space", "format", "projection", "precision", "attention", "prompt", "max_length", "truncation_side",
    "image_size", "views", "view_seed", "batch_size", "seed", "device", "tier", "host_memory", "scheduler", "window",
    "group_by_length",
)  # fmt: skip


def owners() -> dict[str, list[str]]:
    """Every option of a recipe that is one of tuners, and the tuners that have it."""
    found: dict[str, list[str]] = {}
    for name in tuner_names():
        for field in fields(tuner_class(name).config_class):
            if field.name in _FIELDS:
                found.setdefault(field.name, []).append(name)
    return found


def given(recipe: Recipe, option: str) -> bool:
    """Whether the recipe says something else of `option` than nothing."""
    return getattr(recipe, option) != _FIELDS[option].default


def refuse_for_tuners(recipe: Recipe, names: Sequence[str], command: str) -> None:
    """UserError for options of `command` that none of the tuners `names` has, saying which tuner has each; and for what
    chooses among ways of an `--init` that is not asked for."""
    said = [
        f"{option_name(option)} is an option of {', '.join(having)}"
        for option, having in owners().items()
        if command in _FIELDS[option].metadata["on"] and given(recipe, option) and not set(having) & set(names)
    ]
    if said:
        raise UserError(f"{'; '.join(said)}: it would do nothing with {', '.join(names) or 'these methods'}")
    if recipe.prune is not None and recipe.init in (None, "random"):
        raise UserError("--prune: it says how --init chooses channels; give --init magnitude or fisher with it")


def for_tuner(recipe: Recipe, name: str, family: Family) -> Recipe:
    """`recipe` for one tuner of several: the options of the others left out."""
    unused = [option for option, having in owners().items() if name not in having]
    if not pools(name, family):
        unused.append("pooling")
    if "init" in unused or recipe.init in (None, "random"):
        unused.append("prune")
    usual: dict[str, Any] = {option: _FIELDS[option].default for option in unused}
    return replace(recipe, tuner=name, **usual)


def pools(name: str, family: Family) -> bool:
    """Whether a head that pools reads tuner `name` on `family`, unless another is asked for."""
    return not (tuner_class(name, family).text_head and family.writes_text)


def refuse_for_training(recipe: Recipe, family: Family) -> None:
    """UserError for options of training that do nothing with this tuner on this backbone, or in a live run."""
    if given(recipe, "pooling") and not pools(recipe.tuner, family):
        raise UserError(f"--pooling: tuner {recipe.tuner} on {family.name} backbones answers in text and pools nothing")
    if family.modality == "text":  # of pictures the space itself says what they were made with
        refuse_for_kind(recipe, family)
    if recipe.live:
        for option in ("tier", "host_memory", "scheduler"):
            if given(recipe, option):
                raise UserError(f"{option_name(option)}: it is for states from a store, and --live reads none")


def refuse_for_kind(recipe: Recipe, family: Family) -> None:
    """UserError for options of pictures where the backbone reads text, and the other way round."""
    text = family.modality == "text"
    others, read = (PICTURE_OPTIONS, "text") if text else (TEXT_OPTIONS, "pictures")
    for option, nothing in others.items():
        if getattr(recipe, option) not in nothing:
            what = "pictures" if text else "texts"
            raise UserError(f"{option_name(option)} is for {what}, and {family.name} backbones read {read}")
    if text and not family.writes_text and recipe.prompt is not None:
        raise UserError(f"--prompt is for text-to-text backbones; {family.name} ones read the text fields as they are")
    if recipe.view_seed and (recipe.views or 1) < 2:
        raise UserError("--view-seed: it draws the views of --views; give --views 2 or more with it")


def refuse_for_stream(names: Iterable[str]) -> None:
    """UserError for options given to `stream` that it does not look at."""
    for name in names:
        if name in _FIELDS and name not in STREAM_OPTIONS:
            raise UserError(f"stream(): {name}: it does nothing here; there are: {', '.join(STREAM_OPTIONS)}")
