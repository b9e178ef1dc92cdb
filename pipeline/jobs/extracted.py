"""What an extraction made, from what the store says of it: its recipe, and the views that its tables have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.extract.feature_space import options_of
from pipeline.extract.pretrained import local
from pipeline.extract.tasks import canonical_name
from pipeline.lookup.recipe import SPACE_FIELDS, Found
from pipeline.lookup.task_versions import read_by
from pipeline.recipe import Recipe
from pipeline.store import Space, TaskTable
from pipeline.store.errors import UserError
from pipeline.store.tables.texts import Texts


def limited(table: TaskTable, limit: int | None) -> TaskTable:
    """The first `limit` rows, of images all views of the first `limit`, as an extraction with it stores."""
    count = len(table) if limit is None else limit * views_of(table)
    if count >= len(table):
        return table
    return table.take(range(count))


def views_of(table: TaskTable) -> int:
    """How many views of each image a table has; 1 of a table of texts."""
    # A pair of texts, or fields of several slots, not an image and the number of its view.
    if len(table.header["spec"]["fields"]) > 1 or "slots" in table.header:
        return 1
    if isinstance(table.texts, Texts) and table.texts.counts().max(initial=0) < 2:
        return 1
    return 1 + max((int(t[1]) for t in table.texts if len(t) > 1), default=0)


def first_views(table: TaskTable, views: int | None) -> TaskTable:
    """The first `views` views of each image, all where None. UserError where fewer are stored."""
    if views is None or views == (there := views_of(table)):
        return table
    if views > there:
        raise UserError(f"--views {views}: the store has {there} views of each training image; extract with --views")
    return table.take([i for i, t in enumerate(table.texts) if int(t[1]) < views])


def as_extracted(recipe: Recipe, found: Found) -> Recipe:
    """The recipe of the extraction that made the space of `found`: what the space says wins over what was left out."""
    identity = found.space.identity
    named = {k: identity[k] for k in SPACE_FIELDS if k in identity and k != "prompt"} | picture_options(identity)
    known = {k: v for k, v in named.items() if getattr(recipe, k) is None}
    task, space = canonical_name(recipe.task), found.space
    tables = [t for t in space.tables() if t.task == task] if isinstance(space, Space) else []
    if "view_seed" in known and recipe.views is None and isinstance(space, Space):
        # Views of 2 or more share a space, however many there are.
        known["views"] = max((views_of(space.read_table(t)) for t in tables if t.split == "train"), default=2)
    usual: dict[str, Any] = {"format": "float16", "projection": "none", "precision": "float32", "attention": "sdpa"}
    usual |= {"max_length": 128, "truncation_side": "right", "augment": "random", "view_seed": 0}
    name = recipe.model or found.source["names"][0]
    checkpoint = local(name) if "image_size" in known else None
    if checkpoint is not None and checkpoint.tokenizer.extent_text == known["image_size"]:
        usual["image_size"] = known["image_size"]
    stated = {k: v for k, v in known.items() if v != usual.get(k)}
    if found.backbone.continues_text and identity["prompt"] and recipe.objective is None:
        stated["objective"] = "label-text"
    if recipe.prompt is None and identity["prompt"] and isinstance(space, Space):
        usual_prompts = {space.read_header(t)["spec"]["prompt"] for t in tables}
        stated |= {"prompt": identity["prompt"]} if identity["prompt"] not in usual_prompts else {}
    return replace(recipe, model=name, **stated)


def with_columns(recipe: Recipe, space: Space) -> Recipe:
    """`recipe` with the options by which the stored rows of its task were read, where it names no column and they are
    those of one table of texts: what is to be extracted again is read as before."""
    task, first = canonical_name(recipe.task), {}
    read = [read_by(space.read_header(info)) for info in space.tables() if info.task == task]
    named = (recipe.text, recipe.text_pair, recipe.label, recipe.image)
    if read and not any(named) and "image_size" not in space.identity and all(by == read[0] for by in read):
        first = read[0]
    return replace(recipe, **{name: value for name, value in first.items() if not getattr(recipe, name)})


def picture_options(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's options that say how the images of a space were made, nothing for texts. How many views there are
    is of the task's table."""
    if "image_size" not in identity:
        return {}
    text = options_of(identity).text
    views = {"augment": text.augment, "view_seed": text.view_seed} if text.views > 1 else {}
    return {"image_size": text.image_size, **views, **({"frames": text.frames} if text.frames else {})}
