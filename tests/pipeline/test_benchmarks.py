"""What benchmarks take for theirs: figures stand below the settings that they were made with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.recipe import Recipe
from tests.benchmarks.detection import finished


def test_a_finished_detection_run_is_gone_on_with_where_it_has_the_settings(tmp_path: Path) -> None:
    asked = Recipe(
        model="m", task="first-80.json", store="here", tuner="fixed", objective="detection", epochs=60, lr=1e-3,
        schedule="cosine", image_size="short:256:427", objective_options={"head": "retinanet", "head_width": 64},
        out=str(tmp_path), overwrite=True,
    )  # fmt: skip
    assert finished(tmp_path, asked) is None
    more = {"head": "retinanet", "head_width": 64, "metric": "box_map"}  # defaults that a run writes out
    kept = replace(asked, store="/elsewhere/here", objective_options=more, seed=0, out=None, overwrite=False)
    (tmp_path / "recipe.yaml").write_text(kept.to_yaml(), encoding="utf-8")
    assert finished(tmp_path, asked) is None  # a run that has not ended
    (tmp_path / "metrics.json").write_text(json.dumps({"steps": 3}), encoding="utf-8")
    assert finished(tmp_path, asked) == {"steps": 3}
    for other, words in (
        ({"epochs": 24}, "epochs 60, not 24"),
        ({"task": "first-8.json"}, "task first-80.json, not first-8.json"),
        ({"objective_options": {"head": "retinanet", "head_width": 32}}, "head_width 64, not 32"),
    ):
        with pytest.raises(SystemExit, match=f"holds a run of {words}: give its settings, or another --out"):
            finished(tmp_path, replace(asked, **other))
