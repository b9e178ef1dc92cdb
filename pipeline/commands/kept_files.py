"""What tuners want in the store beyond states and the tail: late live layers, and first weights made from the backbone.

Both are files beside the tail weights of a checkpoint: `block-7.safetensors` is a late layer, and
`lst-fisher-released-r8-rte-0123456789abcdef.safetensors` side weights. They are made when an extraction asks for them
and are small, so training never needs the backbone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.command_lines import NotExtracted
from pipeline.extract.backbones import Backbone, Batch
from pipeline.extract.backbones.live import LiveBackbone
from pipeline.extract.encoding import arrays_of, tensors_of
from pipeline.extract.tasks import canonical_name
from pipeline.extract.tasks.base import TaskSpec
from pipeline.lookup.objective import make_objective
from pipeline.owners import config_of
from pipeline.recipe import Recipe
from pipeline.store import Store, digest_json
from pipeline.store.errors import UserError
from pipeline.train.data.targets import Targets
from pipeline.train.importance import FISHER_SAMPLES, fisher, magnitude
from pipeline.train.model import late_weights
from pipeline.train.objectives import Objective
from pipeline.train.tuners import Start, tuner_class, tuner_names

if TYPE_CHECKING:
    from pipeline.commands.extract import Say
    from pipeline.commands.prepare import Split

Weights = dict[str, torch.Tensor]


def block_file(index: int, kept: str) -> str:
    """Where late layer `index` is kept under the mark `kept`."""
    return f"block-{index}{kept}.safetensors"


def start_file(start: Start, task: str, keys: Sequence[str], labels: Sequence[Any], precision: str, kept: str) -> str:
    """Where `start` is kept under the mark `kept`. Fisher information depends on the task's training rows, and so does
    the name."""
    if not start.fisher:
        return f"{start.name}{kept}.safetensors"
    rows = {"keys": list(keys[:FISHER_SAMPLES]), "labels": list(labels[:FISHER_SAMPLES]), "precision": precision}
    return f"{start.name}-{canonical_name(task)[:100]}-{digest_json(rows)[:16]}{kept}.safetensors"


def make_start(
    start: Start, backbone: Backbone, model: Any, objective: Objective, split: Split | None, device: torch.device
) -> Weights:
    """The weights of `start` from a loaded backbone. `split`: the training rows, for Fisher information."""
    if not start.fisher:
        return start.make(model, magnitude(model))
    if split is None or not split.rows.labelled():
        raise UserError("--init fisher needs labelled train rows: extract the train split with it")
    return start.make(model, fisher(backbone, model, objective, _singles(split, objective, device)))


def _singles(split: Split, objective: Objective, device: torch.device) -> Iterator[Batch]:
    targets = Targets(objective, split.rows.labels, split.inputs.metas or None)
    for i in range(min(FISHER_SAMPLES, len(split.rows))):
        batch = split.inputs.take(np.array([i])).batch(device)
        targets.fill(batch, np.array([i]), device)
        yield batch


def keep(
    recipe: Recipe,
    spec: TaskSpec,
    store: Store,
    identity: dict[str, Any],
    kept: str,
    live: LiveBackbone,
    splits: Sequence[Split],
    candidates: Sequence[Sequence[int]],
    say: Say,
) -> None:
    """Put what the tuners of `--for` want of the backbone into the store under the mark `kept`, where it is not there
    already."""
    backbone, digest = live.backbone, identity["weights"]
    train = next((s for s in splits if s.name == "train"), None)
    for name in recipe.tuners:
        if name not in tuner_names(type(backbone)):
            continue
        config, cls = config_of(recipe, name, len(recipe.tuners) > 1), tuner_class(name, backbone)
        blocks = {block_file(i, kept): i for i in cls.late_layers(config, backbone)}
        missing = [f for f in blocks if not store.has_weights(digest, f)]
        if missing:
            say(f"keeping {len(missing)} late layers for {name}")
            late = late_weights(name, config, backbone, live.model)
            store.save_weights(digest, {f: arrays_of(late[blocks[f]]) for f in missing})
        if start := cls.start(config, backbone):
            keys, labels = (train.keys, train.rows.labels) if train else ([], [])
            file = start_file(start, recipe.task, keys, labels, identity["precision"], kept)
            if not store.has_weights(digest, file):
                say(f"first weights of {name}: {start.name}")
                objective = make_objective(recipe, spec, candidates, backbone, cls)
                made = make_start(start, backbone, live.model, objective, train, live.device)
                store.save_weights(digest, {file: arrays_of(made)})


def stored_late(recipe: Recipe, store: Store, digest: str, kept: str, layers: Sequence[int]) -> dict[int, Weights]:
    """The late layers that a tail needs. Raises MissingStates with the command that puts them there."""
    absent = [i for i in layers if not store.has_weights(digest, block_file(i, kept))]
    if absent:
        raise NotExtracted(f"the store does not hold live layer {absent[0]}", recipe)
    return {i: tensors_of(store.load_tensors(digest, block_file(i, kept))) for i in layers}


def stored_start(recipe: Recipe, store: Store, digest: str, start: Start, file: str) -> Weights:
    """First weights from the store. Raises MissingStates with the command that puts them there."""
    if not store.has_weights(digest, file):
        raise NotExtracted(f"the store does not hold {start.name} for this task", recipe)
    return tensors_of(store.load_tensors(digest, file))
