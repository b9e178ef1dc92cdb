"""Plans of language models: bytes are those that are stored, the head is counted on targets alone, windows are rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.commands.extract import run_extract
from pipeline.cost.flops import head_operations
from pipeline.cost.known_shapes import known_config
from pipeline.cost.plan import described, sizes, step_of
from pipeline.cost.workload import workload
from pipeline.extract.backbones import backbone_for
from pipeline.recipe import Recipe
from pipeline.store import Store
from tests import tiny
from tests.pipeline.test_parity import silent


def recipe(folder: Path, model: Path, rows: list[dict], **options) -> Recipe:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Recipe(model=str(model), task=str(folder / "rows.jsonl"), store=str(folder / "S"), tuner="lst",
                  tuner_options={"reduction": 4}, batch_size=8, **options)  # fmt: skip


@pytest.mark.parametrize("stride", [None, 3])
def test_bytes_are_those_that_are_stored(tmp_path, checkpoints, stride):
    asked = recipe(
        tmp_path, checkpoints["decoder"], [{"text": t} for t in tiny.sentences(40)], max_length=8, stride=stride,
        tuners=("lst",),
    )  # fmt: skip
    work = workload(asked)
    made = run_extract(asked, silent, quiet=True)
    assert work.rows == made["rows"]
    (space,) = Store.open(str(tmp_path / "S")).spaces()
    segments = list(space.segments())
    stored = sum(f.stat().st_size for s in segments for part in s.path.iterdir() for f in part.glob("c*"))
    distinct = sum(len(s.keys) for s in segments)
    assert sizes(work, None, None)["float16"]["bytes a sample"] == pytest.approx(stored / distinct, rel=0.05)
    assert sizes(work, None, None)["float16"]["bytes a token"] == pytest.approx(4 * 32 * 2 + 4)  # states, and the id
    assert (work.samples > 40) == (stride is not None)


def test_the_head_is_counted_on_targets_alone(tmp_path, checkpoints):
    words = tiny.sentences(40)
    long = [{"prompt": " ".join(words[:3]), "completion": " a dog"} for _ in words]
    short = [{"text": " ".join(words[:3]) + " a dog"} for _ in words]
    found = {}
    for name, rows in (("completion", long), ("text", short)):
        (tmp_path / name).mkdir()
        work = workload(recipe(tmp_path / name, checkpoints["decoder"], rows))
        batches = work.training_batches()
        ops = step_of(work, batches)
        found[name] = described(work, ops, 1) | {"learned": work.learned, "backbone": ops.backbone}
    (count,) = {int(n.sum()) for _, batch in batches for n in batch.values()}
    targets = found["completion"]["learned"] * count
    assert targets == pytest.approx(8 * 3)  # " a", " dog" and the end, of 8 texts
    head = head_operations(work.backbone, round(targets))
    assert found["completion"]["head a step"] == head < found["text"]["head a step"] / 3
    assert found["completion"]["bound"] == pytest.approx((found["completion"]["backbone"] + head) / head)
    saved = found["text"]["tuner a step"] - found["completion"]["tuner a step"]
    assert saved == pytest.approx(found["text"]["head a step"] - head, rel=0.2)
    assert found["completion"]["ratio"] > found["text"]["ratio"]


def test_shapes_of_published_models():
    for name, count in (("llama-3.2-1b", 1_235_814_400), ("qwen3-0.6b", 596_049_920)):
        backbone = backbone_for(known_config(name))
        assert backbone.usual_precision == "bfloat16"
        with torch.device("meta"):
            assert sum(p.numel() for p in backbone.make().parameters()) == count
