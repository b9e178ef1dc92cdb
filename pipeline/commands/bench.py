"""`pipeline bench`: a small run of what `plan` predicts, and how far off the prediction was.

The checkpoint's own weights are used where it has any, else random ones of its shape: neither speed nor size depends
on them. Everything is made in a temporary folder next to the store, on the disk that is to be used.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pipeline.commands.extract import run_extract
from pipeline.cost.flops import fresh_backbone
from pipeline.cost.plan import Plan, predict
from pipeline.cost.workload import backbone_and_tokenizer, workload
from pipeline.extract.pretrained import Checkpoint, checkpoint_for
from pipeline.jobs.job import load_job
from pipeline.jobs.slots import refuse_slots
from pipeline.jobs.sources import live_backbone, sources
from pipeline.lookup.recipe import device_of, store_path
from pipeline.lookup.task import open_task
from pipeline.recipe import Recipe
from pipeline.store.errors import UserError
from pipeline.terminal import size_text, table_text
from pipeline.train.fit.loop import FitOptions, fit

ROWS = 128
WARM_UP_ROWS = 8


def run_bench(recipe: Recipe, say: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """Predict, run, compare. Raises UserError where there is no tokenizer to make inputs with."""
    refuse_slots(recipe, "bench")
    recipe = replace(recipe, limit=recipe.limit or ROWS, split=("train",), space=None)
    task = open_task(recipe, backbone_and_tokenizer(recipe.model)[0])
    near = Path(store_path(recipe)).resolve().parent
    folder = Path(tempfile.mkdtemp(prefix=".pipeline-bench-", dir=near if near.is_dir() else None))
    try:
        point = with_weights(checkpoint_for(recipe.model), folder)
        recipe = replace(recipe, model=str(point.folder), store=str(folder / "store"))
        plan = predict(workload(recipe, task), recipe)
        say("predicted; now extracting and training")
        found = measure(replace(recipe, format=plan.format), task, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = compared(plan, found)
    text = table_text(
        ["", "predicted", "measured", "measured ÷ predicted"],
        [[name, shown(name, a), shown(name, b), f"{b / a:.2f}"] for name, a, b in rows],
    )
    listed = {name: {"predicted": a, "measured": b, "ratio": b / a} for name, a, b in rows}
    return {"plan": asdict(plan), "compared": listed}, text


def with_weights(point: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint, or one of its shape with random weights where it has none."""
    if any(point.folder.glob("*.safetensors")):
        return point
    made, model = folder / "checkpoint", fresh_backbone(point.backbone, "sdpa")
    if point.backbone.modality == "image":  # timm has no `save_pretrained`; both libraries read this
        made.mkdir()
        for file in point.folder.glob("*.json"):
            shutil.copy(file, made)
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        save_file(state, made / "model.safetensors", metadata={"format": "pt"})
    else:
        model.save_pretrained(made)
        point.tokenizer.save_pretrained(made)
    return Checkpoint(made, point.name)


def measure(recipe: Recipe, task: Any, folder: Path) -> dict[str, float]:
    """Bytes, and seconds of the extraction and of an epoch live, from host memory and from the disk."""
    if recipe.limit is None or recipe.limit <= WARM_UP_ROWS:
        raise UserError(f"--limit: bench needs more than {WARM_UP_ROWS} rows")
    chosen = replace(recipe, tuners=(recipe.tuner,))
    quiet: Callable[[str], None] = lambda line: None  # noqa: E731
    # Loading the backbone is paid once whatever the size of a task: a first, tiny extraction takes it out.
    tiny = run_extract(replace(chosen, limit=WARM_UP_ROWS, store=str(folder / "warm")), quiet, True, task)
    done = run_extract(chosen, quiet, True, task)
    share = done["computed"] / (done["computed"] - tiny["computed"])
    job = load_job(recipe)
    live, point = live_backbone(job)
    parts = {
        "live epoch, s": sources(job, live, point)["train"],
        "cached epoch, host memory, s": sources(replace(job, recipe=replace(recipe, host_memory="1TB")), None)["train"],
        "cached epoch, disk, s": sources(replace(job, recipe=replace(recipe, host_memory="0")), None)["train"],
    }
    found = {"bytes": float(done["bytes"]), "extraction, s": (done["seconds"] - tiny["seconds"]) * share}
    for name, source in parts.items():
        epochs = 2 if name.startswith("live") else 3  # the first ones meet memory that was never touched
        fit(
            job.model(0), source, None, None, FitOptions(epochs=epochs, lr=1e-6), folder / "run", job.objective.scorer,
            device_of(recipe), progress=False,
        )  # fmt: skip
        steps = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
        shutil.rmtree(folder / "run")
        found[name] = min(sum(s["seconds"] for s in steps if s.get("epoch") == e + 1) for e in range(epochs))
    return found


def compared(plan: Plan, found: dict[str, float]) -> list[tuple[str, float, float]]:
    """(what, predicted, measured) of everything that was predicted."""
    predicted = {
        "bytes": plan.formats[plan.format if plan.projection == "none" else f"{plan.format}, {plan.projection}"][
            "total"
        ],
        "extraction, s": plan.extraction_seconds,
        "live epoch, s": plan.live_epoch,
        "cached epoch, host memory, s": plan.cached_epoch["host memory"],
        "cached epoch, disk, s": plan.cached_epoch["disk"],
    }
    return [(name, a, found[name]) for name, a in predicted.items() if a]


def shown(name: str, value: float) -> str:
    return size_text(value) if name == "bytes" else f"{value:.3g}"
