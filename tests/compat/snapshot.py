"""What stores and runs are known by, written down: `python -m tests.compat.snapshot` makes snapshot.json anew.

Names and shapes of everything a run saves (by backbone and tuner), sample keys of given inputs, ids of given
identities, the version of a given task table. None of it depends on the versions of libraries. A change of any of these
orphans stores or runs, so the file is written again only where that is meant.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cost.flops import tuner_model
from pipeline.extract.feature_space import SpaceOptions, space_identity
from pipeline.extract.inputs import Inputs
from pipeline.extract.pretrained import Checkpoint
from pipeline.lookup.task_versions import version_of
from pipeline.store import digest_json
from pipeline.train.tuners import tuner_config
from tests import tiny, vision
from tests.pairs import SUITE, pairs
from tests.train.conformance import small_options

FILE = Path(__file__).with_name("snapshot.json")
SPEC = {
    "name": "pairs", "kind": "classification", "labels": ["no", "yes"], "metrics": ["accuracy"],
    "fields": ["a", "b"], "prompt": "pairs a: {0} b: {1}", "targets": ["0", "1"], "values": [],
}  # fmt: skip
CHECKPOINTS = {**tiny.CHECKPOINTS, **vision.CHECKPOINTS}  # of the families there were when this was written down
# Digests of weights, configuration and tokenizer follow from files that libraries write.
OF_FILES = ("weights", "config", "tokenizer")


def inputs() -> Inputs:
    """Three samples of two streams, with ids at the ends of int32's range."""
    lengths = {"encoder": np.array([2, 1, 3]), "decoder": np.array([1, 2, 1])}
    columns = {
        "encoder.ids": np.array([5, 6, 2**31 - 1, 0, 1, 2], np.int32),
        "decoder.ids": np.array([0, 0, 7, 0], np.int32),
        "decoder.parent": np.array([-1, -1, 0, -1], np.int32),
    }
    return Inputs(lengths, columns)


def observe(folder: Path) -> dict[str, Any]:
    """The facts, from tiny checkpoints made below `folder`."""
    states: dict[str, Any] = {}
    identities: dict[str, Any] = {}
    for name in (name for name in SUITE if name in CHECKPOINTS):
        checkpoint = Checkpoint(CHECKPOINTS[name](folder / name), name)
        identity = space_identity(checkpoint, SpaceOptions())
        identities[name] = {k: "" if k in OF_FILES else v for k, v in identity.items()}
        for tuner in (t for n, t in pairs({name: SUITE[name]}) if n == name):
            config = tuner_config(tuner, small_options(tuner))
            model = tuner_model(checkpoint.backbone, tuner, config, 3)
            states[f"{name} {tuner}"] = {k: "x".join(map(str, v.shape)) for k, v in model._trained().items()}
    return {
        "saved": states,
        "identities": identities,
        "space ids": {name: digest_json(identity) for name, identity in identities.items()},
        "keys": inputs().keys(),
        "version": version_of({"spec": SPEC, "provenance": {"source": "table", "revision": "0" * 32}}),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        FILE.write_text(json.dumps(observe(Path(made)), indent=1, sort_keys=True) + "\n", encoding="utf-8")
