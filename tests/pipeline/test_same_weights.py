"""Feature spaces of the same weights share a folder of kept files: what differs between them is kept apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import api
from pipeline.store import Store, StoreError
from pipeline.store.upkeep.transfer import transfer

COLUMNS = {"text": "first", "text_pair": "second", "label": "label"}


def reconfigured(checkpoint: Path, folder: Path, **changes: Any) -> Path:
    """The same weights and tokenizer with other values in config.json."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def losses(out: Path, **options: Any) -> list[float]:
    """Training losses of a short run."""
    api.train(out=str(out), epochs=2, seed=0, **options)
    return [row["loss"] for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in row]


CASES = [
    ("bert", {"layer_norm_eps": 0.5}, {}, {}, {"tuner": "sherl"}),
    ("t5", {}, {"precision": "bfloat16"}, {"precision": "float32"}, {"tuner": "sherl"}),
    ("t5", {}, {"precision": "bfloat16"}, {"precision": "float32"}, {"tuner": "sherl", "insert": "single:2"}),
    ("t5", {}, {"precision": "bfloat16"}, {"precision": "float32"}, {"tuner": "lst", "init": "magnitude"}),
]


@pytest.mark.parametrize(("backbone", "changes", "first", "second", "how"), CASES)
def test_another_space_of_the_same_weights_changes_nothing(
    checkpoints, table, tmp_path, backbone, changes, first, second, how
):
    other = reconfigured(checkpoints[backbone], tmp_path / "other", **changes)
    task = {"task": str(table), "limit": 24}
    more = {k: v for k, v in how.items() if k != "tuner"}

    def extract(model: Path, store: str, **options: str) -> dict[str, Any]:
        made = {**COLUMNS, **task, **more, **options, "tuners": (how["tuner"],)}
        return api.extract(model=str(model), store=str(tmp_path / store), **made)

    extract(other, "alone", **second)
    extract(checkpoints[backbone], "shared", **first)
    extract(other, "shared", **second)
    run = {**task, **how, **second, "model": str(other)}
    alone = losses(tmp_path / "run-alone", store=str(tmp_path / "alone"), **run)
    assert losses(tmp_path / "run-shared", store=str(tmp_path / "shared"), **run) == alone
    live = losses(tmp_path / "run-live", store=str(tmp_path / "shared"), live=True, **run)
    assert live == pytest.approx(losses(tmp_path / "live-alone", store=str(tmp_path / "alone"), live=True, **run))

    # A union keeps the files of one of them: the other is not read with those.
    extract(checkpoints[backbone], "union", **first)
    alone_store, union = Store.open(tmp_path / "alone"), Store.open(tmp_path / "union")
    transfer(alone_store, union)
    with pytest.raises(StoreError, match="extract again"):
        losses(tmp_path / "run-union", store=str(tmp_path / "union"), **run)
    assert extract(other, "union", **second)["computed"] == 0
    assert losses(tmp_path / "run-union", store=str(tmp_path / "union"), **run) == alone
    # What is there already is not written again.
    there = set((tmp_path / "union" / "weights").rglob("*"))
    extract(checkpoints[backbone], "union", **first)
    extract(other, "union", **second)
    assert set((tmp_path / "union" / "weights").rglob("*")) == there


def test_kept_files_of_an_earlier_version(checkpoints, table, tmp_path):
    """They do not say what they were made with: they are read as before, and not for another configuration."""
    store = tmp_path / "store"
    made = {**COLUMNS, "task": str(table), "limit": 24, "store": str(store), "tuners": ("sherl",)}
    api.extract(model=str(checkpoints["bert"]), **made)
    kept = Store.open(store)
    digest = kept.spaces()[0].identity["weights"]
    files = {name: kept.load_json(digest, name) for name in ("config.json", "source.json")}
    tail = kept.load_tensors(digest, "tail.safetensors")
    run = {"task": str(table), "store": str(store), "limit": 24, "tuner": "sherl"}
    before = losses(tmp_path / "new", model=str(checkpoints["bert"]), **run)
    shutil.rmtree(store / "weights")
    assert files["source.json"].pop("made_with")
    kept.save_weights(digest, {**files, "tail.safetensors": tail})
    there = set((store / "weights").rglob("*"))
    assert losses(tmp_path / "old", model=str(checkpoints["bert"]), **run) == before
    api.extract(model=str(checkpoints["bert"]), **made)
    assert set((store / "weights").rglob("*")) == there
    other = reconfigured(checkpoints["bert"], tmp_path / "other", layer_norm_eps=0.5)
    api.extract(model=str(other), **made)
    assert losses(tmp_path / "other-run", model=str(other), **run) != before
    assert losses(tmp_path / "again", model=str(checkpoints["bert"]), **run) == before
