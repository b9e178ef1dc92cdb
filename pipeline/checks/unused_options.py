"""Options of all runs that would do nothing in this one are refused: whoever gives one would take the result for that
of what they asked. (Those of tuners and objectives go to their owners, see `pipeline.owners`.)"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from pipeline.extract.backbones import Backbone
from pipeline.extract.options import about
from pipeline.jobs.slots import SlotRecipe
from pipeline.option_names import option_name
from pipeline.owners import KINDS, having, options_of
from pipeline.recipe import Recipe
from pipeline.store.errors import UserError

_FIELDS = {f.name: f for f in fields(Recipe)}
# What a recipe says of texts and of images without changing anything: also what recipes of runs write out.
TEXT_OPTIONS: dict[str, tuple[Any, ...]] = {
    "max_length": (None, 128), "truncation_side": (None, "right"), "stride": (None,), "prompt": (None,),
}  # fmt: skip
PICTURE_OPTIONS: dict[str, tuple[Any, ...]] = {
    "image": (None,), "image_size": (None,), "views": (None, 1), "augment": (None, "random"), "view_seed": (None, 0),
    "skip_bad": (False,), "frames": (None,),
}  # fmt: skip
# How a file becomes a task.
TABLE_OPTIONS = ("text", "text_pair", "label", "columns", "separator", "validation", "test", "stratify", "grid")
STREAM_OPTIONS = (
    "model", "task", "store", "data", "text", "text_pair", "image", "label", "columns", "separator", "objective",
    "validation",
    "test", "stratify", "limit", "space", "format", "projection", "precision", "attention", "prompt", "max_length",
    "truncation_side", "stride", "image_size", "views", "augment", "view_seed", "batch_size", "seed", "device", "tier",
    "host_memory", "scheduler", "window", "group_by_length", "imports",
)  # fmt: skip


def given(recipe: Recipe, option: str) -> bool:
    """Whether the recipe says something else of `option` than nothing."""
    return getattr(recipe, option) != _FIELDS[option].default


def refuse_for_training(recipe: Recipe, backbones: Sequence[Backbone]) -> None:
    """UserError for options of training that do nothing on these backbones, or in a live run."""
    if len(backbones) > 1:
        refuse_for_slots(recipe, backbones)
    elif backbones[0].modality == "text":  # of images the space itself says what they were made with
        refuse_for_kind(recipe, backbones[0])
    refuse_host_memory(recipe)
    if recipe.live:
        for option in ("tier", "host_memory", "scheduler"):
            if given(recipe, option):
                raise UserError(f"{option_name(option)}: it is for states from a store, and --live reads none")


def for_kind(recipe: Recipe, backbone: Backbone) -> Recipe:
    """The recipe of a slot without what it says of slots of the other kind: of images where the backbone reads text,
    and the other way round; of a single backbone as it is."""
    if not isinstance(recipe, SlotRecipe):
        return recipe
    left = dict(PICTURE_OPTIONS if backbone.modality == "text" else TEXT_OPTIONS)
    if backbone.modality == "image" and recipe.image is not None:
        left |= dict.fromkeys(("text", "text_pair"), (None,))
    if not backbone.writes_text:  # with several backbones none answers with text
        left["prompt"] = (None,)
    if not backbone.continues_text:
        left["stride"] = (None,)
    return replace(recipe, **{option: nothing[0] for option, nothing in left.items()})


def refuse_for_slots(recipe: Recipe, backbones: Sequence[Backbone]) -> None:
    """UserError for an option of texts or images that no backbone of several reads."""
    for option in (*PICTURE_OPTIONS, *TEXT_OPTIONS):
        refused: list[UserError] = []
        for backbone in backbones:
            try:
                refuse_for_kind(Recipe(**{option: getattr(recipe, option)}), backbone)
            except UserError as error:
                refused.append(error)
        if len(refused) == len(backbones):
            raise refused[0]


def refuse_for_kind(recipe: Recipe, backbone: Backbone) -> None:
    """UserError for options of images where the backbone reads text, and the other way round."""
    text = backbone.modality == "text"
    if recipe.image is not None and recipe.text is not None:
        raise UserError("--text and --image: one of them names the column that the backbone reads")
    others, read = (PICTURE_OPTIONS, "text") if text else (TEXT_OPTIONS, "images")
    for option, nothing in others.items():
        if getattr(recipe, option) not in nothing:
            what = "images" if text else "texts"
            raise UserError(f"{option_name(option)} is for {what}, and {backbone.name} backbones read {read}")
    answers = backbone.writes_text or (backbone.continues_text and recipe.objective == "label-text")
    if text and not answers and recipe.prompt is not None:
        where = "with --objective label-text; else" if backbone.continues_text else "backbones;"
        kind = "language models " if backbone.continues_text else "text-to-text "
        raise UserError(f"--prompt is for {kind}{where} {backbone.name} ones read the text fields as they are")
    if text and not backbone.continues_text and recipe.stride is not None:
        raise UserError(f"--stride is for language models, which go on with a text; {backbone.name} ones do not")
    if recipe.view_seed and (recipe.views or 1) < 2:
        raise UserError("--view-seed: it draws the views of --views; give --views 2 or more with it")
    if recipe.augment == "flip" and (recipe.views != 2 or recipe.view_seed):
        raise UserError(
            "--augment flip: there are two views, the image and its mirror image: give --views 2 and no seed"
        )


def refuse_host_memory(recipe: Recipe) -> None:
    """UserError for memory to choose a tier by, where the tier is said."""
    if recipe.host_memory is not None and recipe.tier != "auto":
        raise UserError(f"--host-memory: it decides the tier, and --tier {recipe.tier} says it; leave one of them out")


def refuse_for_command(command: str, options: Mapping[str, Any]) -> None:
    """UserError for options given in Python that the command line's `command` does not have: those of another, and of
    tuners and objectives what extraction does not depend on."""
    plain = dict(options)
    for kind in KINDS:
        nested = plain.pop(f"{kind}_options", None)
        plain |= nested if isinstance(nested, Mapping) else {}
    for name in plain:
        if name in _FIELDS and command not in _FIELDS[name].metadata["on"]:
            others = " and ".join(c for c in ("extract", "train") if c in _FIELDS[name].metadata["on"])
            raise UserError(f"{command}(): {name}: it does nothing here, it is an option of {others}")
        found = [options_of(kind, owner)[name][0] for kind in KINDS for owner in having(kind, name)]
        if command == "extract" and found and not any(about(f).extraction for f in found):
            raise UserError(f"extract(): {name}: it is for training, extraction does not depend on it")


def refuse_for_stream(names: Iterable[str]) -> None:
    """UserError for options given to `stream` that it does not look at."""
    for name in names:
        known = name in _FIELDS or any(having(kind, name) for kind in KINDS)
        if known and name not in STREAM_OPTIONS:
            raise UserError(f"stream(): {name}: it does nothing here; there are: {', '.join(STREAM_OPTIONS)}")
