"""`pipeline train`: a tuner trained from the store, or with the backbone live."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.checks.doubtful_rows import doubts, limit_doubt
from pipeline.checks.unused_options import refuse_for_training
from pipeline.command_lines import NotExtracted, quoted
from pipeline.extract.plugins import lasting
from pipeline.extract.tasks import is_named
from pipeline.extract.tasks.base import TaskSpec
from pipeline.extract.tasks.hub_images import PREFIX
from pipeline.extract.tasks.registry import is_folder, is_table
from pipeline.jobs.extracted import views_of
from pipeline.jobs.job import Job, agreed
from pipeline.jobs.joint import Joint
from pipeline.jobs.mixture import Mixture, open_job, own_options
from pipeline.lookup.recipe import store_path
from pipeline.lookup.task_versions import columns_text, task_id
from pipeline.recipe import Recipe
from pipeline.store.errors import UserError
from pipeline.store.files.places import absolute
from pipeline.terminal import counted
from pipeline.train.fit.at_work import at_work
from pipeline.train.fit.log import write_bytes
from pipeline.train.fit.loop import FitOptions, fit
from pipeline.train.fit.ranks import Ranks
from pipeline.train.model import Model

Say = Callable[[str], None]
AnyJob = Job | Joint | Mixture
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
        report_to=recipe.report_to,
    )


def usual_lr(job: AnyJob, model: Model) -> float:
    """The learning rate where none is given: the tuner's own, or what the objective starts from at most."""
    known = [part.objective.usual_lr for part in job.each if part.objective.usual_lr is not None]
    return min([model.tuner.default_lr(), *known])


def run_folder(job: AnyJob) -> Path:
    """--out, or a folder named after the run: the task by its name where everybody means the same by it, else with the
    beginning of its id."""
    recipe = job.recipe
    if recipe.out:
        return Path(recipe.out)
    names = [(part.spec.name, part.version[:8]) for part in job.each]
    task = "+".join(name if is_named(name) else f"{name}@{version}" for name, version in names)
    model, tuner = job.model_name.replace("/", "_"), recipe.tuner.replace(",", "+")
    fold = f"-fold-{recipe.fold.replace('/', '-of-')}" if recipe.fold else ""
    return Path("runs") / (f"{task}-{tuner}-{model}-s{recipe.seed}{fold}" + ("-live" if recipe.live else ""))


def make_folder(folder: Path) -> None:
    """Make the folder of `--out`. Raises UserError where a file stands in its place, or it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        file = next((p for p in (folder, *folder.parents) if p.is_file()), None)
        why = f"{file} is a file" if file else error.strerror or str(error)
        raise UserError(f"--out {folder}: the folder cannot be made ({why}); choose another") from None


def refuse_finished(folder: Path, recipe: Recipe) -> None:
    """UserError where a finished run stands in `folder` that is not to be replaced."""
    if (folder / "metrics.json").exists() and not recipe.overwrite:
        raise UserError(f"{folder} holds a finished run; give another --out, or --overwrite to replace it")


def refuse_parts(job: AnyJob) -> None:
    """UserError where a step over several batches or processes would not be the step of one large batch."""
    ranks, several = Ranks.from_environment().world, job.recipe.accumulate > 1
    for part in job.each:
        rows, size = len(part.tables.get("train", ())), job.batch_size
        if part.objective.gathers and (size < ranks or 0 < rows % size < ranks):
            raise UserError(
                f"--batch-size {size}: of {rows:,} pairs the last batch has {rows % size or size}, and each of {ranks} "
                "processes needs one of every batch; give another size"
            )
        if part.objective.coupled and (several or (ranks > 1 and not part.objective.gathers)):
            what = "--accumulate" if several else f"{ranks} processes"
            raise UserError(
                f"{what}: objective {part.objective.name} compares the samples of a batch with each other, so a batch "
                "cannot be made of parts; give a larger --batch-size to one process"
            )
        if part.objective.coupled and job.batch_size < 2:
            raise UserError(
                f"--batch-size {job.batch_size}: objective {part.objective.name} compares the samples of a batch with "
                "each other; give 2 at least"
            )
    counted = {part.spec.name: part.objective.counts for part in job.each}
    if several and len(set(counted.values())) > 1:
        said = ", ".join(f"{what} of {task}" for task, what in counted.items())
        raise UserError(f"--accumulate: a step would weigh the tasks by {said}; leave it out, or train them apart")


def run_train(recipe: Recipe, say: Say, quiet: bool = False) -> dict[str, Any]:
    """Train what `recipe` says; `say` takes the lines a person reads. Returns the metrics with the run's folder."""
    job = open_job(recipe)
    refuse_for_training(recipe, job.backbones)
    refuse_parts(job)
    for part in job.each:
        if "train" not in part.tables:
            what = f"the store has no train rows of {part.spec.name}"
            raise NotExtracted(what, part.as_extracted(), split=("train",))
    folder = run_folder(job)
    refuse_finished(folder, recipe)
    model = job.model(recipe.seed)
    options = fit_options(recipe, job.spec, job.paper, usual_lr(job, model))
    parts = job.sources(recipe.live)
    tables = [part.tables["train"] for part in job.each]
    rows, total = sum(map(len, tables)), sum(table.header.get("total", len(table)) for table in tables)
    more, name = f" of {total:,}" if rows < total else "", ", ".join(part.spec.name for part in job.each)
    learned = ", ".join(f"{part.spec.name} ({part.objective.name})" for part in job.each)
    say(
        f"{recipe.tuner} on {learned}: {rows:,}{more} train rows, batch {job.batch_size}, "
        f"{counted(options.epochs, 'epoch')}, {model.trainable_parameters():,} trainable parameters, "
        + ("live backbone" if recipe.live else "from the store")
    )
    for table in tables:
        say(f"rows {task_id(table.header)}: {columns_text(table.header)}, of {str(table.header.get('created'))[:10]}")
    for line in job.describe():
        say(line)
    odd = [sentence for part in job.each for sentence in job_doubts(part)]
    for sentence in odd:
        say(f"warning: {sentence}")
    make_folder(folder)
    first = Ranks.from_environment().rank == 0
    with at_work(folder) if first else nullcontext():
        if first:
            refuse_finished(folder, recipe)  # another process may just have ended
        metrics = fit(
            model,
            parts["train"],
            parts.get("validation"),
            parts.get("test"),
            options,
            folder,
            job.scorer,
            job.device,
            progress=not quiet,
            info={
                "space": job.spaces,
                "tuner": recipe.tuner,
                "rows": job.version,
                "fold": recipe.fold,
                "chosen": own_options(job),
                **({"tasks": name} if len(job.each) > 1 else {}),  # their order is that of a mixture's draws
            },
            record=partial(write_recipe, folder, job, options) if first else lambda: None,
        )
    if remark := model.tuner.remark():
        say(f"{recipe.tuner}: {remark}")
    about = {"run": str(folder), "space": job.spaces, "tuner": recipe.tuner, "task": name}
    return {**about, **metrics, "warnings": odd, "next": next_commands(job, folder)}


def next_commands(job: AnyJob, folder: Path) -> list[str]:
    """What one does with a finished run: its scores, and predictions on inputs never seen."""
    run, first = quoted(str(folder)), job.each[0].objective
    task = f" --task {quoted(job.each[0].spec.name)}" if len(job.each) > 1 else ""
    use = "generate {} --prompt TEXT" if first.continues_text else "predict {} --input FILE"
    if first.files:
        use += " --out-dir FOLDER"
    slots = job.jobs.values() if isinstance(job, Joint) and "pair" in first.targets else ()
    texts = sum(part.found.backbone.modality == "text" for part in slots)
    search = [f"pipeline search {run} --query TEXT"] if texts == 1 else []
    return [f"pipeline evaluate {run}{task}", f"pipeline {use.format(run + task)}", *search]


def job_doubts(job: Job | Joint) -> list[str]:
    """What is odd about the rows of a run, a sentence each."""
    train = job.tables.get("train")
    limit = "" if train is None else limit_doubt(job.recipe.limit, train, views_of(train))
    images = isinstance(job, Job) and job.found.backbone.modality == "image"
    return [*([limit] if limit else []), *doubts(job.tables, images)]


def lasting_name(job: Job | Joint) -> str:
    """The task as a recipe names it for good: by its file or folder, by a name that everybody knows, or by its id."""
    task = job.recipe.task
    own = is_table(task) or is_folder(task) or is_named(task) or task.startswith(PREFIX)
    return task if own else task_id(next(iter(job.tables.values())).header)


def resolved_recipe(job: AnyJob, options: FitOptions) -> Recipe:
    """The run's options with every default resolved."""
    objectives = [part.objective for part in job.each]
    alike = len({o.name for o in objectives}) == 1
    return replace(
        job.recipe,
        task=",".join(lasting_name(part) for part in job.each),
        store=absolute(store_path(job.recipe)),
        batch_size=job.batch_size if len({part.batch_size for part in job.each}) == 1 else None,
        group_by_length=job.grouped,
        objective=objectives[0].name if alike else job.recipe.objective,
        epochs=options.epochs,
        lr=options.lr,
        warmup_steps=options.warmup_steps,
        warmup_ratio=options.warmup_ratio,
        imports=lasting(job.recipe.imports),
        objective_options=agreed([o.config for o in objectives], job.recipe.objective_options)
        if alike
        else job.recipe.objective_options,
        out=None,
        overwrite=False,
        **job.resolved(),
    )


def write_recipe(folder: Path, job: AnyJob, options: FitOptions) -> None:
    """recipe.yaml: the run's options with every default resolved, so that it can be run again by `--recipe`."""
    resolved = resolved_recipe(job, options)
    title = f"{job.recipe.tuner} on {job.spec.name}, {time.strftime('%Y-%m-%d')}"
    header = f"{title}\npipeline train --recipe recipe.yaml --out OTHER"
    write_bytes(folder / "recipe.yaml", resolved.to_yaml(header).encode())
