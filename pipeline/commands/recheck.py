"""`pipeline store verify --recompute K`: random samples through the backbone again, compared with what is stored.

Of texts the store keeps what the backbone was fed. Of images it keeps the names: they are read again from the folders
given, and taken only where they still are what was extracted, by their sample key.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.checks.stored import backbone_from, source_of
from pipeline.commands.prepare import load_backbone
from pipeline.extract.backbones.base import Backbone
from pipeline.extract.encoding import decode
from pipeline.extract.feature_space import differences_of, refuse_other
from pipeline.extract.inputs import Inputs
from pipeline.extract.pretrained import Checkpoint
from pipeline.jobs.slots import named_parts
from pipeline.jobs.sources import text_options
from pipeline.lookup.recipe import Found
from pipeline.store import Space, Store, stream_of
from pipeline.store.errors import UserError
from pipeline.store.format.samples import Samples
from pipeline.store.segments.index import bundles
from pipeline.store.upkeep.rewrite import read_bundle

# Largest difference in a row over the row's largest value: rounding of the number format, and of another batch shape.
FORMAT_TOLERANCE = {"float32": 0.0, "float16": 1e-3, "bfloat16": 8e-3, "int8": 8e-3}
PRECISION_TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


def recheck(
    store: Store, count: int, model: str = "", seed: int | None = None, data: Sequence[str | Path] = ()
) -> list[dict[str, Any]]:
    """Compare `count` random samples of each space. One entry a space: the worst difference, the tolerance, `ok`, and
    how many samples were passed over because their image is not at hand.

    `model`: where the checkpoint is; of several slots as `extract` takes them, image=FOLDER,text=FOLDER.
    `data`: folders that the file names of images are relative to. Raises UserError if the checkpoint or every image is
    not at hand, or the checkpoint is another one.
    """
    return [_recheck(store, space, count, model, random.Random(seed), data) for space in store.spaces()]


def _checkpoint_of(store: Store, space: Space, model: str) -> Checkpoint:
    """What `space` was extracted with: `model`, of several (image=FOLDER,text=FOLDER) the one that it is; else by the
    name it had then. Raises UserError where it is another one."""
    from pipeline.extract.pretrained import checkpoint_for

    names = list(named_parts(model, "model").values()) or [model or source_of(store, space)["names"][0]]
    given = [checkpoint_for(name) for name in names]
    checkpoint = next((point for point in given if not differences_of(point, space.identity)), given[0])
    refuse_other(checkpoint, space.identity)
    return checkpoint


def _recheck(
    store: Store, space: Space, count: int, model: str, pick: random.Random, data: Sequence[str | Path]
) -> dict[str, Any]:
    identity = space.identity
    checkpoint = _checkpoint_of(store, space, model)
    backbone = backbone_from(store, space)
    images = backbone.modality == "image"
    inputs_of = _images(space, backbone, checkpoint, data) if images else _columns(backbone)
    live = load_backbone(
        checkpoint, identity["precision"], identity["attention"], torch.device("cpu"), backbone.projection
    )
    tolerance = FORMAT_TOLERANCE[identity["format"]] + PRECISION_TOLERANCE[identity["precision"]]
    found = bundles(space.segments())
    places = [(f, i) for f in found for i in range(len(f.base))]
    worst, where, checked, absent = 0.0, "", 0, 0
    for member, position in pick.sample(places, len(places)):
        if checked == count:
            break
        states = [n for n, s in member.holder.items() if n in s.states]
        # Samples whose image is not at hand are passed over before their states are read.
        read = None if images else read_bundle(member, list(member.holder), np.array([position]))
        inputs = inputs_of(member.base.keys[position], read)
        if inputs is None:
            absent += 1
            continue
        read = read or read_bundle(member, list(member.holder), np.array([position]))
        checked += 1
        with torch.inference_mode():
            again = live.states(inputs, states)
        for name in states:
            kept, now = decode(read.states[name]), again.states[name].float().cpu()
            scale = now.abs().amax(1).clamp_min(1e-6)
            # A row of tiny values is as exact as the larger rows beside it.
            difference = float(((kept - now).abs().amax(1) / scale.clamp_min(float(scale.mean()) * 0.1)).max())
            if not difference <= worst:
                worst, where = difference, f"{name} of sample {read.keys[0]} in segment {member.holder[name].id}"
    if absent and not checked:
        raise UserError(
            f"--data: of space {space.id[:12]} no image is in {', '.join(map(str, data))} as it was extracted; give "
            "the folder that the task's file names are relative to"
        )
    return {
        "space": space.id,
        "samples": checked,
        "absent": absent,
        "worst": worst,
        "where": where,
        "tolerance": tolerance,
        "ok": bool(worst <= tolerance),
    }


InputsOf = Callable[[str, Samples | None], Inputs | None]


def _columns(backbone: Backbone) -> InputsOf:
    """A sample's inputs from its stored columns."""

    def inputs(key: str, read: Samples | None) -> Inputs:
        assert read is not None
        columns = {n: read.columns[n] for n in backbone.columns}
        return Inputs({stream_of(n): read.lengths[stream_of(n)] for n in columns}, columns, np.zeros(1, bool))

    return inputs


def _images(space: Space, backbone: Backbone, checkpoint: Checkpoint, data: Sequence[str | Path]) -> InputsOf:
    """A sample's inputs from its image, by the file name that a task table has; None where none is as it was."""
    if not data:
        raise UserError(
            f"--recompute: space {space.id[:12]} is of images, which a store does not keep: give their folder, --data"
        )
    names: dict[str, set[tuple[str, ...]]] = {}
    for info in space.tables():
        table = space.read_table(info)
        for key, fields in zip(table.keys, table.texts, strict=True):
            names.setdefault(key, set()).add(tuple(fields))
    options = text_options(Found(space, backbone, dict, {}))

    def inputs(key: str, read: Samples | None) -> Inputs | None:
        for fields in sorted(names.get(key, ())):
            for folder in data:
                try:
                    found = backbone.prepare(checkpoint.tokenizer, [fields], replace(options, root=str(folder)))
                except UserError:  # it is not there, or cannot be read
                    continue
                if found.keys() == [key]:
                    return found
        return None

    return inputs
