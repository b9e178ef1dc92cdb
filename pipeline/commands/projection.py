"""The projection of the feature space that `extract` is asked for: the one the store has, else one fitted now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.command_lines import store_command
from pipeline.extract.backbones import Backbone, Inputs
from pipeline.extract.backbones.live import LiveBackbone
from pipeline.extract.batching import consecutive_batches
from pipeline.extract.encoding import arrays_of
from pipeline.extract.projection import (
    MAPS,
    about_name,
    file_name,
    fit,
    load_projection,
    parse_projection,
    sample,
)
from pipeline.store import Store
from pipeline.store.errors import StoreError
from pipeline.terminal import counted

FIT_SAMPLES = 1024


def project(
    store: Store,
    identity: dict[str, Any],
    live: LiveBackbone,
    inputs: Inputs,
    seed: int,
    tokens: int,
    task: str,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], LiveBackbone]:
    """`identity` completed with the fit of its projection, and the backbone that applies it.

    A space of the store that differs in nothing but the fit gives its own, the largest if there are several, so that
    the same command always goes on in one space; otherwise up to `FIT_SAMPLES` of `inputs` are run to fit one.
    """
    parsed = parse_projection(identity["projection"], live.backbone.width)
    if parsed is None:
        return identity, live
    known = [s for s in store.spaces() if {**s.identity, "projection_fit": ""} == identity]
    if known:
        chosen = max(known, key=lambda s: (sum(len(part) for part in s.segments()), s.id))
        found = load_projection(store, chosen.identity)
        assert found is not None
        about = _about(store, chosen.identity)
        few = f"fitted on {about.get('samples', '?')} samples" + (f" of {about['task']}" if "task" in about else "")
        say(f"projection {identity['projection']}: the one of feature space {chosen.id[:12]}, {few}")
        if about.get("samples", FIT_SAMPLES) < min(FIT_SAMPLES, len(inputs)):
            remove = store_command("rm", store.where, chosen.id[:12])
            say(f"warning: it was {few} only; to fit it anew, remove the space: {remove}")
    else:
        widths = live.backbone.narrowed(parsed[1], parsed[0] == MAPS)
        pick = inputs.take(sample(FIT_SAMPLES, len(inputs), seed))
        if parsed[0] != "orthogonal":
            say(f"projection {identity['projection']}: fitting {len(widths)} states on {len(pick):,} samples")
        found = fit(*parsed, seed, widths, _states(live, pick, list(widths), tokens))
        about = {"samples": len(pick), "task": task, "seed": seed}
        files = {file_name(found.digest): arrays_of(found.tensors()), about_name(found.digest): about}
        store.save_weights(identity["weights"], files)
    return {**identity, "projection_fit": found.digest}, live.projected(found)


def _about(store: Store, identity: dict[str, Any]) -> dict[str, Any]:
    try:
        return store.load_json(identity["weights"], about_name(identity["projection_fit"]))
    except StoreError:
        return {}


def _states(live: LiveBackbone, inputs: Inputs, states: list[str], tokens: int) -> Iterator[dict[str, Tensor]]:
    order = np.argsort(inputs.tokens(), kind="stable")
    inputs = inputs.take(order)
    for batch in consecutive_batches(inputs.tokens(), tokens, None):
        yield live.states(inputs.take(batch), states).states


def widths_text(states: Sequence[str], backbone: Backbone) -> str:
    """ "6 states of width 384", of a pyramid "4 states of width 8 to 112", or how many have how many channels."""
    projection = backbone.projection
    full = [name for name in states if projection is None or name not in projection.basis]
    widths = sorted({backbone.state_width(name) for name in full}) or [backbone.width]
    width = " to ".join(f"{w:,}" for w in sorted({widths[0], widths[-1]}))
    text = f"{counted(len(full), 'state')} of width {width}"
    if projection is None or len(full) == len(states):
        return text
    if not full:
        return f"{counted(len(states), 'state')} projected to {projection.width}"
    return f"{text} and {len(states) - len(full)} projected to {projection.width}"
