"""`pipeline train`: a tuner trained from the store, or with the backbone live."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.command_line import NotExtracted
from pipeline.doubts import doubts, limit_doubt
from pipeline.extract.plugins import lasting
from pipeline.extract.tasks import is_named
from pipeline.extract.tasks.base import TaskSpec
from pipeline.extract.tasks.hub_images import PREFIX
from pipeline.extract.tasks.registry import is_folder, is_table
from pipeline.job import (
    Job,
    as_extracted,
    batch_size_of,
    grouped,
    live_backbone,
    load_job,
    picture_options,
    sources,
    views_of,
)
from pipeline.recipe import Recipe
from pipeline.resolve import store_path
from pipeline.store.errors import UserError
from pipeline.store.places import absolute
from pipeline.train.configs import ObjectiveConfig
from pipeline.train.loop import FitOptions, fit
from pipeline.train.ranks import Ranks
from pipeline.train.runlog import write_bytes
from pipeline.train.tuners import TunerConfig
from pipeline.unused import refuse_for_training
from pipeline.versions import columns_text, task_id

Say = Callable[[str], None]
LARGE_TASKS = ("mnli", "qnli", "qqp", "sst2")


def fit_options(recipe: Recipe, spec: TaskSpec, paper: bool, lr: float) -> FitOptions:
    """Training options with the defaults of the papers' protocol on T5 (methods §5), where `paper`, and else of ours.
    `lr`: the method's own learning rate."""
    epochs = recipe.epochs or (10 if spec.name in LARGE_TASKS else 20)
    steps, ratio = recipe.warmup_steps, recipe.warmup_ratio
    if steps is None and ratio is None:
        steps, ratio = (500, None) if paper else (None, 0.1)
    return FitOptions(
        epochs=epochs,
        max_steps=recipe.max_steps,
        lr=recipe.lr or lr,
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


def run_folder(job: Job) -> Path:
    """--out, or a folder named after the run: the task by its name where everybody means the same by it, else with the
    beginning of its id."""
    recipe, task = job.recipe, job.spec.name
    if recipe.out:
        return Path(recipe.out)
    task = task if is_named(task) else f"{task}@{job.version[:8]}"
    model = job.found.source["names"][0].replace("/", "_")
    return Path("runs") / (f"{task}-{recipe.tuner}-{model}-s{recipe.seed}" + ("-live" if recipe.live else ""))


def make_folder(folder: Path) -> None:
    """Make the folder of `--out`. Raises UserError where a file stands in its place, or it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        file = next((p for p in (folder, *folder.parents) if p.is_file()), None)
        why = f"{file} is a file" if file else error.strerror or str(error)
        raise UserError(f"--out {folder}: the folder cannot be made ({why}); choose another") from None


def run_train(recipe: Recipe, say: Say, quiet: bool = False) -> dict[str, Any]:
    """Train what `recipe` says; `say` takes the lines a person reads. Returns the metrics with the run's folder."""
    job = load_job(recipe)
    refuse_for_training(recipe, job.found.backbone)
    if "train" not in job.tables:
        known = as_extracted(recipe, job.found)
        raise NotExtracted(f"the store has no train rows of {job.spec.name}", known, split=("train",))
    folder = run_folder(job)
    if (folder / "metrics.json").exists() and not recipe.overwrite:
        raise UserError(f"{folder} holds a finished run; give another --out, or --overwrite to replace it")
    model = job.model(recipe.seed)
    options = fit_options(recipe, job.spec, job.paper, model.tuner.default_lr())
    live, checkpoint = live_backbone(job) if recipe.live else (None, None)
    parts = sources(job, live, checkpoint)
    size = batch_size_of(recipe, model.tuner.backbone.writes_text)
    table = job.tables["train"]
    more = f" of {table.header['total']:,}" if len(table.keys) < table.header.get("total", 0) else ""
    say(
        f"{recipe.tuner} on {job.spec.name}: {len(table.keys):,}{more} train rows, batch {size}, "
        f"{options.epochs} epochs, {model.trainable_parameters():,} trainable parameters, "
        + ("live backbone" if recipe.live else "from the store")
    )
    say(f"rows {task_id(table.header)}: {columns_text(table.header)}, of {str(table.header.get('created'))[:10]}")
    say(f"space {job.found.space.id[:12]}: {describe_space(job)}")
    odd = job_doubts(job)
    for sentence in odd:
        say(f"warning: {sentence}")
    make_folder(folder)
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
        info={
            "space": job.found.space.id,
            "tuner": recipe.tuner,
            "rows": job.version,
            "chosen": own_options(job, asdict),
        },
    )
    if remark := model.tuner.remark():
        say(f"{recipe.tuner}: {remark}")
    about = {"run": str(folder), "space": job.found.space.id, "tuner": recipe.tuner, "task": job.spec.name}
    return {**about, **metrics, "warnings": odd}


def job_doubts(job: Job) -> list[str]:
    """What is odd about the rows of a run, a sentence each."""
    train = job.tables.get("train")
    limit = "" if train is None else limit_doubt(job.recipe.limit, train, views_of(train))
    return [*([limit] if limit else []), *doubts(job.tables, job.found.backbone.modality == "image")]


def describe_space(job: Job) -> str:
    """One line about the space a run reads."""
    identity = job.found.space.identity
    return (
        f"{job.found.source['names'][0]}, {len(job.states)} states, {identity['format']}, computed in "
        f"{identity['precision']}, texts up to {identity['max_length']} tokens"
    )


def lasting_name(job: Job) -> str:
    """The task as a recipe names it for good: by its file or folder, by a name that everybody knows, or by its id."""
    task = job.recipe.task
    own = is_table(task) or is_folder(task) or is_named(task) or task.startswith(PREFIX)
    return task if own else task_id(next(iter(job.tables.values())).header)


def stated(config: TunerConfig | ObjectiveConfig) -> dict[str, Any]:
    """The options of a config that say something, the defaults among them: a later version may have others."""
    return {k: v for k, v in asdict(config).items() if v not in (None, ())}


def own_options(job: Job, of: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """The options of the tuner and the objective as a recipe has them, those that `of` makes of a config."""
    own = Recipe(tuner_options=of(job.config), objective_options=of(job.objective.config)).to_mapping()
    return {"objective": job.objective.name, **{k: own[k] for k in ("tuner_options", "objective_options")}}


def rows_options(job: Job) -> dict[str, Any]:
    """How the rows were split and numbers made into texts, also where the store decided it."""
    made, values = job.tables["train"].header.get("provenance", {}), job.spec.values
    stepped = len(values) > 1 and made.get("source") != "table"  # of a table the step follows from its range
    grid = values[1] - values[0] if stepped else job.recipe.grid
    return {"stratify": bool(made.get("stratified")) or job.recipe.stratify, "grid": grid}


def resolved_recipe(job: Job, options: FitOptions, batch_size: int) -> Recipe:
    """The run's options with every default resolved."""
    identity = job.found.space.identity
    return replace(
        job.recipe,
        task=lasting_name(job),
        model=job.recipe.model or job.found.source["names"][0],
        store=absolute(store_path(job.recipe)),
        space=job.found.space.id,
        batch_size=batch_size,
        group_by_length=grouped(job.recipe, job.paper),
        epochs=options.epochs,
        lr=options.lr,
        warmup_steps=options.warmup_steps,
        warmup_ratio=options.warmup_ratio,
        **own_options(job, stated),
        views=views_of(job.tables["train"]) if "image_size" in identity else None,
        imports=lasting(job.recipe.imports),
        **rows_options(job),
        out=None,
        overwrite=False,
        **{k: identity[k] for k in ("format", "projection", "precision", "attention")},
        **{k: identity[k] for k in ("max_length", "truncation_side")},
        **picture_options(identity),
    )


def write_recipe(folder: Path, job: Job, options: FitOptions, batch_size: int) -> None:
    """recipe.yaml: the run's options with every default resolved, so that it can be run again by `--recipe`."""
    resolved = resolved_recipe(job, options, batch_size)
    title = f"{job.recipe.tuner} on {job.spec.name}, {time.strftime('%Y-%m-%d')}"
    header = f"{title}\npipeline train --recipe recipe.yaml --out OTHER"
    write_bytes(folder / "recipe.yaml", resolved.to_yaml(header).encode())
