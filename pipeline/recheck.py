"""`pipeline store verify --recompute K`: random samples through the backbone again, compared with what is stored."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from extract.backbones.inputs import Inputs
from extract.identity import refuse_other
from pipeline.extracting import load_backbone
from pipeline.stored import family_from, source_of
from store import Space, Store, decode, stream_of
from store.index import families
from store.rewrite import read_family

# Largest difference in a row over the row's largest value: rounding of the number format, and of another batch shape.
FORMAT_TOLERANCE = {"float32": 0.0, "float16": 1e-3, "bfloat16": 8e-3, "int8": 8e-3}
PRECISION_TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


def recheck(store: Store, count: int, model: str = "", seed: int | None = None) -> list[dict[str, Any]]:
    """Compare `count` random samples of each space. One entry a space: the worst difference, the tolerance, `ok`.

    Raises UserError if the checkpoint is not at hand or another one.
    """
    return [_recheck(store, space, count, model, random.Random(seed)) for space in store.spaces()]


def _recheck(store: Store, space: Space, count: int, model: str, pick: random.Random) -> dict[str, Any]:
    from extract.checkpoint import resolve

    identity = space.identity
    checkpoint = resolve(model or source_of(store, space)["names"][0])
    refuse_other(checkpoint, identity)
    family = family_from(store, space)
    checkpoint.family.projection = family.projection
    backbone = load_backbone(checkpoint, identity["precision"], identity["attention"], torch.device("cpu"))
    tolerance = FORMAT_TOLERANCE[identity["format"]] + PRECISION_TOLERANCE[identity["precision"]]
    found = families(space.segments())
    places = [(f, i) for f in found for i in range(len(f.base))]
    worst, where, checked = 0.0, "", 0
    for member, position in pick.sample(places, min(count, len(places))):
        states = [n for n, s in member.holder.items() if n in s.states]
        read = read_family(member, list(member.holder), np.array([position]))
        columns = {n: read.columns[n] for n in family.columns}
        inputs = Inputs({stream_of(n): read.lengths[stream_of(n)] for n in columns}, columns, np.zeros(1, bool))
        checked += 1
        with torch.inference_mode():
            live = backbone.states(inputs, states)
        for name in states:
            kept, now = decode(read.states[name]), live.states[name].float().cpu()
            scale = now.abs().amax(1).clamp_min(1e-6)
            # A row of tiny values is as exact as the larger rows beside it.
            difference = float(((kept - now).abs().amax(1) / scale.clamp_min(float(scale.mean()) * 0.1)).max())
            if not difference <= worst:
                worst, where = difference, f"{name} of sample {read.keys[0]} in segment {member.holder[name].id}"
    return {
        "space": space.id,
        "samples": checked,
        "worst": worst,
        "where": where,
        "tolerance": tolerance,
        "ok": bool(worst <= tolerance),
    }
