"""From a recipe to the things it names: store, task, checkpoint, feature-space options, tuner configs, device."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pipeline.checks.stored import backbone_from, kept_name, kept_of, source_of
from pipeline.checks.unused_options import for_kind, refuse_for_kind
from pipeline.command_lines import NoneFits, NotExtracted
from pipeline.extract.backbones import Backbone, TextOptions
from pipeline.extract.backbones.images import Preprocess
from pipeline.extract.encoding import tensors_of
from pipeline.extract.feature_space import SpaceOptions, space_identity, views_text
from pipeline.extract.pretrained import Checkpoint, local
from pipeline.extract.projection import MAPS, parse_projection
from pipeline.extract.tasks import canonical_name, refuse_grid
from pipeline.extract.tasks.base import DENSE, TaskSpec
from pipeline.jobs.slots import slot_of
from pipeline.lookup.objective import answers_in_text
from pipeline.lookup.store_folder import store_place
from pipeline.lookup.task import need, picture_root
from pipeline.lookup.task_versions import versions_of
from pipeline.owners import config_of
from pipeline.recipe import Recipe
from pipeline.store import Space, Store
from pipeline.store.errors import NoStore, SeveralSpaces, SpaceMismatch, StoreError, UserError
from pipeline.store.near import near
from pipeline.store.select import choose_space, differences
from pipeline.train.model import union_states
from pipeline.train.tuners import fitting_tuner, tuner_class, tuner_names

# Options of a recipe that are fields of a feature space.
SPACE_FIELDS = ("format", "projection", "precision", "attention", "prompt", "max_length", "truncation_side", "stride")
TELLING = (*SPACE_FIELDS, "image_size", "views")  # that may be all in which two spaces of a model differ
PICTURES = ("image_size", "views", "augment", "view_seed")  # and those that say how images are made


def store_path(recipe: Recipe) -> str:
    """--store, else $PIPELINE_STORE, else ./activations."""
    return store_place(recipe.store)


def device_of(recipe: Recipe) -> torch.device:
    """The device to compute on. UserError when a GPU is asked for and there is none."""
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu or auto")
    use_gpu = recipe.device != "cpu" and torch.cuda.is_available()
    if use_gpu and "LOCAL_RANK" in os.environ:  # a process of torchrun's, each with a GPU of its own
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return torch.device("cuda" if use_gpu else "cpu")


def space_options(recipe: Recipe, spec: TaskSpec, backbone: Backbone) -> SpaceOptions:
    """The feature space a recipe asks for, the defaults of `backbone` filled in."""
    prompt = spec.prompt if recipe.prompt is None else recipe.prompt
    if backbone.continues_text and not answers_in_text(recipe.objective, spec, backbone):
        prompt = ""
    elif backbone.continues_text and "{0}" not in prompt:
        raise UserError(f"--prompt {prompt!r}: it must hold {{0}}, where the text stands")
    text = TextOptions(
        prompt=prompt,
        max_length=recipe.max_length or backbone.usual_length,
        truncation_side="left" if recipe.truncation_side == "left" else "right",
        stride=recipe.stride,
        root=picture_root(recipe),
        skip_bad=recipe.skip_bad,
        image_size=size_text(recipe.image_size),
        views=recipe.views or 1,
        augment=recipe.augment or "random",
        view_seed=recipe.view_seed or 0,
        dense=spec.target in DENSE,
        frames=recipe.frames or 0,
    )
    return SpaceOptions(
        format=recipe.format or "float16",
        projection=recipe.projection or "none",
        precision=recipe.precision or backbone.usual_precision,
        attention=recipe.attention or backbone.attentions[0],
        text=text,
    )


def size_text(size: str | None) -> str:
    """--image-size as the feature space has it: 224 is 224x224."""
    return f"{size}x{size}" if size and size.isdigit() else size or ""


def wanted_tuners(recipe: Recipe, backbone: Backbone) -> tuple[str, ...]:
    """The tuners of `--for`; where nobody asked for them by name, those of them that `backbone` has a form for."""
    if not recipe.tuners:
        raise UserError("--for: name at least one tuner; `pipeline tuners` lists them")
    if recipe.tuners != Recipe().tuners:
        return recipe.tuners
    return tuple(name for name in recipe.tuners if name in tuner_names(type(backbone)))


def wanted_states(recipe: Recipe, backbone: Backbone) -> list[str]:
    """The states that `wanted_tuners` read between them."""
    names = wanted_tuners(recipe, backbone)
    return union_states([(name, config_of(recipe, name, len(recipe.tuners) > 1)) for name in names], backbone)


def refuse_full_readers(recipe: Recipe, names: Sequence[str], backbone: Backbone) -> None:
    """UserError for a tuner of `names` that cannot work in the projected space `recipe` asks for."""
    if (kept := parse_projection(recipe.projection or "none", backbone.width)) is None:
        return
    maps, read = kept[0] == MAPS, set[str]()
    narrowed = backbone.narrowed(kept[1], maps).keys()
    for name in names:
        tuner = tuner_class(name, backbone)
        states = set(tuner.states(config_of(recipe, name, len(names) > 1), backbone))
        if not tuner.reads(recipe.projection or "none") and narrowed & states:
            raise UserError(f"tuner {name} reads full states, not {recipe.projection}: extract without it")
        read |= states
    if (maps or backbone.shape != "sequence") and not narrowed & read:
        which = f"no state wider than {kept[1]}" if maps else f"full states alone (pca-maps:{kept[1]} keeps these, too)"
        raise UserError(f"--projection: {' and '.join(names)} on {backbone.name} backbones read {which}")


@dataclass
class Unstored:
    """A feature space that is in no store: what a live run without one computes in."""

    id: str
    identity: dict[str, Any]


@dataclass
class Found:
    """A feature space and the backbone that made it, rebuilt from what the store keeps (or, unstored, from the
    checkpoint). `read_tail`: gives the weights of the live end."""

    space: Space | Unstored
    backbone: Backbone
    read_tail: Callable[[], dict[str, torch.Tensor]]
    source: dict[str, Any]

    @cached_property
    def tail(self) -> dict[str, torch.Tensor]:
        """Weights of the live end, read when they are first asked for: a stream of states needs none. StoreError where
        they are missing or damaged."""
        return self.read_tail()


OF_TEXTS, OF_IMAGES = ("max_length", "truncation_side", "prompt"), ("image_size", "views", "frames")  # of identities


def wanted_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields of an identity that the recipe asks for in so many words."""
    wanted: dict[str, Any] = {k: v for k in SPACE_FIELDS if (v := getattr(recipe, k)) is not None}
    if recipe.image_size is not None:
        wanted["image_size"] = Preprocess().sized(size_text(recipe.image_size)).extent_text
    if recipe.frames is not None:
        wanted["frames"] = recipe.frames
    if recipe.views is not None or recipe.view_seed is not None or recipe.augment is not None:
        # A seed alone asks for views: without any, nothing is drawn.
        wanted["views"] = views_text(recipe.views or 2, recipe.view_seed or 0, recipe.augment or "random")
    return wanted


def find_space(recipe: Recipe, exactly: str | None = None) -> Found:
    """The one feature space of the store that fits the recipe's model, task and explicit options; or the one whose id
    is `exactly`, of which nothing else is asked.

    When the checkpoint is at hand its digests must match, so that a changed checkpoint is noticed; when it is not, the
    name it was extracted under decides. Raises StoreError saying which command to run, SpaceMismatch naming the fields
    in which what is there differs from what was asked, or SeveralSpaces.
    """
    need(recipe, "task")
    if exactly is None and recipe.grid is not None:
        refuse_grid(recipe.task, recipe.grid)
    try:
        store = Store.open(store_path(recipe))
    except NoStore as error:
        if exactly is None:
            raise NotExtracted(str(error).split(", or ")[0], recipe) from None
        raise  # a run knows its store, which has moved
    task, slot = canonical_name(recipe.task), slot_of(recipe)
    spaces = _of_task(store, task, slot)
    if not spaces:
        what = f"task {task!r} for slot {slot}" if slot else f"task {task!r}"
        hint = near(task, {t.task for s in store.spaces() for t in s.tables()})
        raise NotExtracted(f"the store {store.where} holds no states of {what}{hint}", recipe)
    if exactly is not None:
        if space := next((s for s in spaces if s.id == exactly), None):
            return _found(store, space)
        others = ", ".join(s.id[:12] for s in spaces)
        raise StoreError(f"feature space {exactly} is not in {store.where}, which has of task {task!r}: {others}")
    if recipe.space:
        spaces = [s for s in spaces if s.id.startswith(recipe.space)]
        if len(spaces) != 1:
            what = f"--space {recipe.space}: fits {len(spaces)} spaces with task {task!r}, must fit one"
            raise SeveralSpaces(what) if spaces else StoreError(what)
    spaces, wanted, checkpoint = _asked(recipe, store, spaces)
    try:
        return _found(store, choose_space(spaces, wanted))
    except SeveralSpaces:
        raise
    except SpaceMismatch as error:
        backbone = None if checkpoint is None else checkpoint.backbone
        if recipe.space or not _can_extract(recipe, backbone or backbone_from(store, spaces[0])):
            raise
        raise NoneFits(str(error), recipe) from None


def _of_task(store: Store, task: str, slot: str) -> list[Space]:
    """The feature spaces with tables of `task`, for `slot`."""
    spaces = [s for s in store.spaces() if any(t.task == task for t in s.tables())]
    if slot or len(spaces) > 1:  # a task of several slots has tables of the same name
        own = [s for s in spaces if any(v.slot == slot for v in versions_of(s, task, damaged=[]))]
        spaces = own if slot or own else spaces
    return spaces


def _asked(recipe: Recipe, store: Store, spaces: list[Space]) -> tuple[list[Space], dict[str, Any], Checkpoint | None]:
    """Of `spaces` those of the recipe's model by name, the fields of an identity that it asks for, and the checkpoint
    where it is at hand. Raises NotExtracted where none is of the model."""
    wanted, checkpoint = wanted_fields(recipe), None
    if slot_of(recipe):  # what is said of images is not for a slot of texts, and the other way round
        kinds = {"image_size" in space.identity for space in spaces}
        foreign = {*(OF_TEXTS if True in kinds else ()), *(OF_IMAGES if False in kinds else ())}
        wanted = {field: value for field, value in wanted.items() if field not in foreign}
    if recipe.model:
        checkpoint = local(recipe.model)
        if checkpoint is not None:
            wanted.update(
                weights=checkpoint.weights_digest,
                config=checkpoint.config_digest,
                tokenizer=checkpoint.tokenizer_digest,
            )
        else:
            name = Path(recipe.model).name if "/" in recipe.model else recipe.model
            named = [s for s in spaces if name in names_of(store, s)]
            if not named:
                known = sorted({n for s in spaces for n in names_of(store, s)})
                there = f"{', '.join(known)}{near(name, known)}"
                what = f"no states of task {canonical_name(recipe.task)!r} by model {name!r} in {store.where}"
                raise NotExtracted(f"{what}; there are some by: {there}", recipe)
            spaces = named
    return spaces, wanted, checkpoint


def told_apart(recipe: Recipe, known: Mapping[str, Any], id: str = "") -> dict[str, Any]:
    """The options that training by `recipe` needs beside its own to find one feature space, where others of the store
    fit, too; {} where none does. `known`: fields of its identity; `id`: its own, where it is stored already."""
    if recipe.space:
        return {}
    try:
        store = Store.open(store_path(recipe))
        spaces = [s for s in _of_task(store, canonical_name(recipe.task), slot_of(recipe)) if s.id != id]
        if not spaces:
            return {}
        spaces, wanted, _ = _asked(recipe, store, spaces)
    except UserError:  # there is no store, or nothing of the model
        return {}
    others = [s.identity for s in spaces if not differences(s.identity, wanted)]
    said = [n for n in TELLING if n in known and any(o.get(n) != known[n] for o in others)]
    if id and any(all(o.get(n) == known[n] for n in said) for o in others):
        return {"space": id[:12]}  # no option says it
    return {n: 1 if n == "views" else known[n] for n in said}


def _can_extract(recipe: Recipe, backbone: Backbone) -> bool:
    """Whether an extraction with the options of `recipe` would be done, for all that can be said without the rows."""
    try:
        own = for_kind(recipe, backbone)
        refuse_for_kind(own, backbone)
        fitting_tuner(own.tuner, config_of(own, own.tuner), backbone)
        refuse_full_readers(own, [own.tuner], backbone)
    except UserError:
        return False
    return True


def _found(store: Store, space: Space) -> Found:
    digest = space.identity["weights"]
    backbone = backbone_from(store, space)
    name = kept_name("tail.safetensors", kept_of(store, space.identity))
    return Found(space, backbone, lambda: tensors_of(store.load_tensors(digest, name)), source_of(store, space))


def names_of(store: Store, space: Space) -> list[str]:
    """The names a space's model goes by."""
    return list(source_of(store, space)["names"])


def expected_identity(checkpoint: Checkpoint, recipe: Recipe, spec: TaskSpec) -> dict[str, Any]:
    """The identity of the space `recipe` asks for."""
    return space_identity(checkpoint, space_options(recipe, spec, checkpoint.backbone))
