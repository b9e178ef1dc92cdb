"""The task that a recipe names, with its rows."""

from __future__ import annotations

from pathlib import Path

from pipeline.extract.backbones import Backbone
from pipeline.extract.tasks import Task, load_task
from pipeline.extract.tasks.captions import Paired
from pipeline.extract.tasks.glue import USUAL_GRID
from pipeline.extract.tasks.hub_images import PREFIX, hub_folder
from pipeline.jobs.slots import SlotRecipe, together
from pipeline.lookup.objective import refuse_targets, target_types
from pipeline.option_names import option_name
from pipeline.recipe import Recipe
from pipeline.store.errors import UserError


def need(recipe: Recipe, *names: str) -> None:
    """Raises UserError for the first of `names` that is not given."""
    for name in names:
        if not getattr(recipe, name):
            raise UserError(f"{option_name(name)} is missing; `pipeline {name}s` lists what there is")


def open_task(recipe: Recipe, backbone: Backbone | None = None) -> Task:
    """The task with its rows, from a folder, a table or the hub, for a backbone of `backbone`, which decides what texts
    without labels are; of one slot of several, these are paired with what the others read. UserError where the
    objective asked for learns other targets."""
    need(recipe, "task")
    # With several backbones none is asked to write: there is one answer, and a head of them all gives it.
    several = isinstance(recipe, SlotRecipe)
    files = recipe.image is not None or (backbone is not None and backbone.modality == "image")
    task = load_task(
        recipe.task,
        Path(recipe.data) if recipe.data else None,
        text=recipe.image or recipe.text,
        text_pair=recipe.text_pair,
        label=recipe.label,
        separator=recipe.separator,
        targets=target_types(recipe),
        validation=Path(recipe.validation) if recipe.validation else None,
        test=Path(recipe.test) if recipe.test else None,
        stratify=bool(recipe.stratify),
        columns=recipe.columns,
        grid=USUAL_GRID if recipe.grid is None else recipe.grid,
        continues=backbone is not None and backbone.continues_text and not several,
        paired=Paired(together(recipe), files) if isinstance(recipe, SlotRecipe) else None,
        void=recipe.objective_options.get("ignore_index"),
        skip_bad=recipe.skip_bad,
    )
    refuse_targets(recipe, task.spec)
    return task


def picture_root(recipe: Recipe) -> str:
    """The folder that the file names of a task with images are relative to."""
    if recipe.task.startswith(PREFIX):
        return str(hub_folder(recipe.task, recipe.data))
    if recipe.data:
        return recipe.data
    path = Path(recipe.task)
    return str(path if path.is_dir() else path.parent)
