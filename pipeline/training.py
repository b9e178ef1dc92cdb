"""`pipeline train`: a tuner trained from the store, or with the backbone live."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from extract.tasks import canonical_name
from extract.tasks.base import TaskSpec
from pipeline.job import Job, batch_size_of, grouped, live_backbone, load_job, sources
from pipeline.recipe import Recipe
from pipeline.resolve import Found, extract_command, store_path
from store.errors import StoreError, UserError
from store.places import absolute
from train.loop import FitOptions, fit
from train.model import Model
from train.ranks import Ranks

Say = Callable[[str], None]
LARGE_TASKS = ("mnli", "qnli", "qqp", "sst2")


def fit_options(recipe: Recipe, spec: TaskSpec, model: Model) -> FitOptions:
    """Training options with the defaults of the papers' protocol on T5 (methods §5) and of ours on encoders."""
    paper = model.tuner.family.writes_text
    epochs = recipe.epochs or (10 if spec.name in LARGE_TASKS else 20)
    steps, ratio = recipe.warmup_steps, recipe.warmup_ratio
    if steps is None and ratio is None:
        steps, ratio = (500, None) if paper else (None, 0.1)
    return FitOptions(
        epochs=epochs,
        max_steps=recipe.max_steps,
        lr=recipe.lr or model.tuner.default_lr(),
        weight_decay=recipe.weight_decay,
        schedule=recipe.schedule,
        warmup_steps=steps,
        warmup_ratio=ratio,
        clip=recipe.clip,
        accumulate=recipe.accumulate,
        precision=recipe.train_precision,
        seed=recipe.seed,
        patience=recipe.patience,
        tensorboard=recipe.tensorboard,
    )


def run_folder(recipe: Recipe, found: Found) -> Path:
    """--out, or a folder named after the run."""
    if recipe.out:
        return Path(recipe.out)
    model = found.source["names"][0].replace("/", "_")
    name = f"{canonical_name(recipe.task)}-{recipe.tuner}-{model}-s{recipe.seed}" + ("-live" if recipe.live else "")
    return Path("runs") / name


def run_train(recipe: Recipe, say: Say, quiet: bool = False) -> dict[str, Any]:
    """Train what `recipe` says; `say` takes the lines a person reads. Returns the metrics with the run's folder."""
    job = load_job(recipe)
    if "train" not in job.tables:
        raise StoreError(
            f"the store has no train rows of {job.spec.name}; run: {extract_command(recipe)} --split train"
        )
    folder = run_folder(recipe, job.found)
    if (folder / "metrics.json").exists() and not recipe.overwrite:
        raise UserError(f"{folder} holds a finished run; give another --out, or --overwrite to replace it")
    model = job.model(recipe.seed)
    options = fit_options(recipe, job.spec, model)
    backbone, checkpoint = live_backbone(job) if recipe.live else (None, None)
    parts = sources(job, backbone, checkpoint)
    size = batch_size_of(recipe, model.tuner.family.writes_text)
    table = job.tables["train"]
    more = f" of {table.header['total']:,}" if len(table.keys) < table.header.get("total", 0) else ""
    say(
        f"{recipe.tuner} on {job.spec.name}: {len(table.keys):,}{more} train rows, batch {size}, "
        f"{options.epochs} epochs, {model.trainable_parameters():,} trainable parameters, "
        + ("live backbone" if recipe.live else "from the store")
    )
    say(f"space {job.found.space.id[:12]}: {describe_space(job)}")
    folder.mkdir(parents=True, exist_ok=True)
    if Ranks.from_environment().rank == 0:
        write_recipe(folder, job, options, size)
    metrics = fit(
        model,
        parts["train"],
        parts.get("validation"),
        parts.get("test"),
        options,
        folder,
        job.objective.scorer,
        job.device,
        progress=not quiet,
        info={"space": job.found.space.id, "tuner": recipe.tuner, "rows": job.version},
    )
    if remark := model.tuner.remark():
        say(f"{recipe.tuner}: {remark}")
    return {"run": str(folder), "space": job.found.space.id, "tuner": recipe.tuner, "task": job.spec.name, **metrics}


def describe_space(job: Job) -> str:
    """One line about the space a run reads."""
    identity = job.found.space.identity
    return (
        f"{job.found.source['names'][0]}, {len(job.states)} states, {identity['format']}, computed in "
        f"{identity['precision']}, texts up to {identity['max_length']} tokens"
    )


def write_recipe(folder: Path, job: Job, options: FitOptions, batch_size: int) -> None:
    """recipe.yaml: the run's options with every default resolved, so that it can be run again by `--recipe`."""
    identity = job.found.space.identity
    resolved = replace(
        job.recipe,
        model=job.recipe.model or job.found.source["names"][0],
        store=absolute(store_path(job.recipe)),
        space=job.found.space.id,
        batch_size=batch_size,
        group_by_length=grouped(job.recipe, job.paper),
        epochs=options.epochs,
        lr=options.lr,
        warmup_steps=options.warmup_steps,
        warmup_ratio=options.warmup_ratio,
        out=None,
        overwrite=False,
        **{k: identity[k] for k in ("format", "precision", "attention", "max_length", "truncation_side")},
    )
    title = f"{job.recipe.tuner} on {job.spec.name}, {time.strftime('%Y-%m-%d')}"
    header = f"{title}\npipeline train --recipe recipe.yaml --out OTHER"
    (folder / "recipe.yaml").write_text(resolved.to_yaml(header), encoding="utf-8")
