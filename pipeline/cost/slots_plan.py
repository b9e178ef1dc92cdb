"""What the states of a run of several backbones take, slot by slot: bytes alone, no times.

Each distinct sample of a slot is stored once: an image once for its five captions, a video with all of its frames.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checks.unused_options import for_kind
from pipeline.commands.prepare import of_slot
from pipeline.cost.image_sizes import image_extents
from pipeline.cost.workload import Workload, backbone_and_tokenizer, sample_lengths
from pipeline.extract.backbones.videos import frames_in
from pipeline.extract.backbones.vision import Vision
from pipeline.extract.tasks.base import Rows
from pipeline.jobs.slots import parts_of
from pipeline.lookup.recipe import space_options
from pipeline.lookup.task import open_task, picture_root
from pipeline.owners import config_of
from pipeline.recipe import Recipe
from pipeline.store import FORMATS
from pipeline.terminal import size_text, table_text
from pipeline.train.tuners import fitting_tuner


def plan_slots(recipe: Recipe) -> tuple[dict[str, Any], str]:
    """Slot → samples, states and bytes in each format; their sum; the pairs of each split. As a mapping and as text."""
    slots: dict[str, Any] = {}
    pairs: dict[str, int] = {}
    for slot, part in parts_of(recipe).items():
        with of_slot(slot):
            work, frames = _work(part)
        each = {fmt: work.sample_bytes(fmt, "all") for fmt in FORMATS}
        slots[slot] = {
            "samples": work.rows["all"],
            "states": work.states,
            "positions": work.positions("all"),
            **({"frames": frames} if frames else {}),
            "bytes a sample": each,
            "total": {fmt: size * work.rows["all"] for fmt, size in each.items()},
        }
        pairs = {split: n for split, n in work.rows.items() if split != "all"}
    total = {fmt: sum(found["total"][fmt] for found in slots.values()) for fmt in FORMATS}
    rows = [
        [slot, f"{of['samples']:,}", str(len(of["states"])), *(size_text(of["bytes a sample"][f]) for f in FORMATS),
         size_text(of["total"]["float16"])]
        for slot, of in slots.items()
    ]  # fmt: skip
    head = ["slot", "samples", "states", *(f"{fmt} a sample" for fmt in FORMATS), "float16 in all"]
    said = ", ".join(f"{split} {n:,}" for split, n in pairs.items())
    text = f"pairs: {said}\n{table_text(head, rows)}\nin all: " + ", ".join(
        f"{f} {size_text(total[f])}" for f in FORMATS
    )
    return {"pairs": pairs, "slots": slots, "total": total}, text


def _work(recipe: Recipe) -> tuple[Workload, int]:
    """One slot's samples, all splits together as the split `all`; and the frames of a video."""
    backbone, tokenizer = backbone_and_tokenizer(recipe.model)
    recipe = for_kind(recipe, backbone)
    task = open_task(recipe, backbone)
    splits = {s: rows.head(recipe.limit) for s, rows in task.splits.items() if not recipe.split or s in recipe.split}
    texts = list(dict.fromkeys(text for rows in splits.values() for text in rows.texts))
    every = Rows(texts, [None] * len(texts))
    if isinstance(backbone, Vision):
        text = space_options(recipe, task.spec, backbone).text
        lengths = backbone.measure(image_extents(tokenizer.sized(text.image_size), every, text))  # type: ignore[union-attr]
        if text.frames:
            shown = np.array([_frames(Path(picture_root(recipe)) / name, text.frames) for (name,) in texts], np.int64)
            lengths = {name: n * shown for name, n in lengths.items()}
    else:
        task.splits = {"all": every}
        lengths, _ = sample_lengths(backbone, tokenizer, task, "all", recipe)
    config = config_of(recipe, recipe.tuner)
    states = fitting_tuner(recipe.tuner, config, backbone).states(config, backbone)
    counts = {**{s: len(rows) for s, rows in splits.items()}, "all": len(texts)}
    work = Workload(backbone, recipe.tuner, config, states, 2, {"all": lengths}, counts, 1, False, 1, tokenizer is None)
    return work, recipe.frames or 0


def _frames(folder: Path, most: int) -> int:
    """The frames shown of a video, all that may be where it is not here."""
    return min(most, len(frames_in(folder))) if folder.is_dir() else most
