"""`pipeline sweep`: many runs on one task, those on the same samples in one pass over the store."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.command_lines import command_line, option
from pipeline.commands import lr_range
from pipeline.commands.compare import fit_baseline, refuse_baseline, step_memory
from pipeline.commands.grid import Trial
from pipeline.commands.halving import Halving, refuse_halving, refuse_other_factor
from pipeline.commands.proposals import Search
from pipeline.commands.sweep_jobs import Prepared, prepare_all, shared
from pipeline.commands.sweep_table import SWEEP, summary, summary_text, table_of, write_csv
from pipeline.commands.train import (
    job_doubts,
    make_folder,
    resolved_recipe,
    write_recipe,
)
from pipeline.jobs.job import Job, load_job
from pipeline.jobs.mixture import own_options
from pipeline.jobs.slots import refuse_slots
from pipeline.recipe import Recipe, read_recipe
from pipeline.store.errors import UserError
from pipeline.store.format.digest import digest_json
from pipeline.terminal import counted
from pipeline.train.data.store_source import StoreSource
from pipeline.train.fit.at_work import Note, refuse_lost
from pipeline.train.fit.finite import NotFinite
from pipeline.train.fit.log import finite, write_json
from pipeline.train.fit.loop import Training
from pipeline.train.fit.ranks import Ranks
from pipeline.train.fit.run_files import TUNER
from pipeline.train.fit.run_files import load as load_checkpoint
from pipeline.train.fit.together import Judge, fit_all
from pipeline.train.metrics import ERRORS

Say = Callable[[str], None]
PRESET = "ours"  # whose settings baselines have
LOSERS = "halving.json"  # which settings were stopped, after which epoch
OF_SWEEP = ("memory_bytes", "stacked", "in_turn")  # what a run's own files do not tell: see `fit_all`
BASELINE = "baseline.json"  # beside a baseline's metrics: what it was made with


@dataclass(frozen=True)
class Extras:
    """What a sweep does beside training all its points: `search` draws them, `halving` stops losers by this factor,
    `refit` trains the best setting once more on training and validation rows. `lr_range`: the runs are range tests."""

    search: Search | None = None
    halving: int | None = None
    refit: bool = False
    lr_range: bool = False


def run_sweep(
    asked: Sequence[Trial], folder: Path, say: Say, quiet: bool = False, extras: Extras | None = None
) -> tuple[dict[str, Any], str]:
    """Train all that is `asked`, each into `folder`/NAME, and tabulate. Runs that are finished there are kept, and
    those that a kill left unfinished go on.

    UserError, before anything is trained, for what one of them would be refused for, and where `folder` holds another
    run under the name of one.
    """
    extras = extras or Extras()
    if Ranks.from_environment().world > 1:
        raise UserError("a sweep is one process: start it without torchrun, or train its runs one by one")
    note = Note(folder, runs=True)
    try:
        return _swept(asked, _Sweep(folder, say, quiet, extras, note))
    finally:
        note.drop()


def _swept(asked: Sequence[Trial], sweep: _Sweep) -> tuple[dict[str, Any], str]:
    extras = sweep.extras
    if (search := extras.search) is None:
        sweep.train(asked)
    else:
        while True:
            sweep.train(search.trials())
            rows = summary(sweep.rows())["settings"] if sweep.asked else []
            sign = -1.0 if rows and sweep.figure in ERRORS else 1.0
            lost = {s["label"] for s in rows if s["ended"] < s["seeds"] or s["dev"] is None}
            if not search.propose({s["label"]: None if s["label"] in lost else sign * s["dev"] for s in rows}):
                break
    result = sweep.write()
    if extras.lr_range:
        result = sweep.write(lr_range=lr_range.told(result["runs"]))
        return result, f"{summary_text(result)}\n\n{lr_range.told_text(result['lr_range'])}"
    if extras.refit:
        if result["best"] is None:
            sweep.say("nothing is refitted: no setting is the best")
        else:
            result = sweep.refit(result)
    return result, summary_text(result)


class _Sweep:
    """A sweep in `folder`. `asked`: its runs so far; `done`: what those that have ended did with. `tabulated`: whether
    its table is the folder's. `note`: of this process, taken before anything is written."""

    def __init__(self, folder: Path, say: Say, quiet: bool, extras: Extras, note: Note, tabulated: bool = True) -> None:
        self.folder, self.say, self.quiet, self.extras, self.tabulated = folder, say, quiet, extras, tabulated
        self.note = note
        self.asked: list[Trial] = []
        self.jobs: dict[str, Job] = {}
        self.done: dict[str, dict[str, Any]] = {}

    @property
    def figure(self) -> str:
        """What chooses the best epoch."""
        return self.jobs[self.asked[0].name].scorer().first

    def train(self, asked: Sequence[Trial]) -> None:
        """Train those of `asked`, which are all there are by now, that were not trained yet."""
        new = [trial for trial in asked if trial.name not in self.jobs]
        self.asked = list(asked)
        if not new:
            return
        for trial in new:
            refuse_slots(trial.recipe, "sweep")
        settings, seeds = len({t.label for t in new}), len({t.recipe.seed for t in new})
        self.say(f"{counted(len(new), 'run')}: {counted(settings, 'setting')}, {counted(seeds, 'seed')}")
        prepared = self.look_up(new)
        make_folder(self.folder)
        self.note.take([self.folder / trial.name for trial in new])
        self.take_done(new, prepared)
        own = [trial for trial in new if not trial.baseline]
        for sentence in job_doubts(prepared[own[0].name].job) if own else []:
            self.say(f"warning: {sentence}")
        passes: dict[str, list[Prepared]] = {}
        for trial in own:
            if trial.name not in self.done:
                passes.setdefault(prepared[trial.name].meets(), []).append(prepared[trial.name])
        for number, members in enumerate(passes.values(), start=1):
            job = max((member.job for member in members), key=lambda job: len(job.states))
            over = f"{counted(len(members), 'run')} over {len(job.tables['train'].keys):,} train rows"
            self.say(f"pass {number} of {len(passes)}: {over}; {', '.join(job.describe())}")
            self.done |= _train(members, self.folder, not self.quiet, self.judge(own, members))
            self.write()
        for trial in new:
            if trial.name not in self.done:
                self.say(f"{trial.name}, the backbone live")
                self.done[trial.name] = _baseline(trial, self.jobs[trial.name], self.folder / trial.name)
                self.write()

    def look_up(self, new: Sequence[Trial]) -> dict[str, Prepared]:
        """What each of `new` takes. Refuses what could not be trained, or not be finished as asked."""
        prepared = prepare_all([trial for trial in new if not trial.baseline])
        found = {name: member.job for name, member in prepared.items()}
        for trial in new:
            if trial.baseline:
                found[trial.name] = refuse_baseline(trial.recipe, trial.baseline, PRESET)
        if self.extras.halving is not None:
            dev = all("validation" in member.parts for member in prepared.values())
            passes, lengths = {m.meets() for m in prepared.values()}, {m.options().epochs for m in prepared.values()}
            if any(trial.baseline for trial in new) or self.extras.search is not None:
                raise UserError("--halving stops tuners of a grid: leave --search and live baselines out")
            if any(trial.recipe.max_steps for trial in new):
                raise UserError("--halving counts epochs: give --epochs instead of --max-steps")
            refuse_halving(self.extras.halving, len(passes), dev, lengths)
        if self.extras.refit and not self.jobs:
            for trial in {t.recipe.tuner: t for t in new}.values():
                if trial.recipe.fold == "all" or "validation" not in found[trial.name].tables:
                    raise UserError("--refit: there is no validation split to choose the best setting by")
                load_job(replace(trial.recipe, fold="all"))
        self.jobs |= found
        return prepared

    def take_done(self, new: Sequence[Trial], prepared: Mapping[str, Prepared]) -> None:
        """What the folder holds of `new`. UserError for another run, or another sweep with losers."""
        before = table_of(self.folder)
        names = {trial.name for trial in new}
        if self.extras.halving is not None:
            refuse_other_factor(self.extras.halving, self.folder / LOSERS)
        if self.extras.halving is not None and before and before.keys() != names:
            raise UserError(
                f"{self.folder} holds another sweep: its losers were stopped beside others; give another --out"
            )
        count = 0
        for trial in new:
            known, member = before.get(trial.name, {}), prepared.get(trial.name)
            found = _found(trial, self.jobs[trial.name], self.folder / trial.name, member, known)
            if found is not None and found.get("stopped") == "halving" and self.extras.halving is None:
                raise UserError(f"{self.folder / trial.name} was stopped as a loser: give --halving, or another --out")
            if found is not None:
                self.done[trial.name] = found
                count += 1
        if count:
            self.say(f"{count} of them are finished already")

    def judge(self, own: Sequence[Trial], members: Sequence[Prepared]) -> Callable[[Sequence[Training]], Judge | None]:
        """What makes the judge of a pass from its runs."""
        factor = self.extras.halving

        def make(runs: Sequence[Training]) -> Judge | None:
            if factor is None:
                return None
            labels = {run: member.trial.label for run, member in zip(runs, members, strict=True)}
            settings = len({trial.label for trial in own})
            return Halving(factor, labels, settings, members[0].options().epochs, self.folder / LOSERS)

        return make

    def rows(self) -> list[dict[str, Any]]:
        """The table, a row a run."""
        ended = {trial.name: self.done.get(trial.name, {"status": "unfinished"}) for trial in self.asked}
        return [_row(trial, self.folder, ended[trial.name], self.jobs[trial.name]) for trial in self.asked]

    def write(self, **more: Any) -> dict[str, Any]:
        """The table of what is done, in the folder too, as JSON and CSV."""
        rows, first = self.rows(), self.asked[0].recipe
        result = {"out": str(self.folder), "task": first.task, "model": first.model, **summary(rows), **more}
        if self.tabulated:
            refuse_lost(self.folder)
            write_json(self.folder / SWEEP, result)
            write_csv(self.folder / SWEEP.replace(".json", ".csv"), rows)
        return result

    def refit(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """The best setting on training and validation rows, with the seed of its best run and as many epochs as its
        runs had at their best, in the middle; the last epoch counts."""
        row = next(row for row in result["runs"] if row["run"] == result["best"]["run"])
        trial = next(trial for trial in self.asked if trial.name == row["name"])
        best = [r["best_epoch"] for r in result["runs"] if r["label"] == row["label"] and r["best_epoch"]]
        recipe = replace(trial.recipe, fold="all", epochs=round(statistics.median(best)), patience=None)
        name = f"refit-e{recipe.epochs}-{trial.name}"
        again = replace(trial, name=name, label=f"refit {trial.label}", recipe=recipe)
        self.say(f"the best, {row['label']}, once more, on training and validation rows, for {recipe.epochs} epochs")
        other = _Sweep(self.folder, self.say, self.quiet, Extras(), self.note, tabulated=False)
        other.train([again])
        return self.write(refit=other.rows()[0])


def _train(
    members: Sequence[Prepared], folder: Path, progress: bool, judge: Callable[[Sequence[Training]], Judge | None]
) -> dict[str, dict[str, Any]]:
    """Train runs that see the same samples in the same batches: name → what it ended with."""
    refuse_lost(folder)
    parts = shared(members)
    runs: list[Training] = []
    for member in members:
        job, recipe, own = member.job, member.trial.recipe, folder / member.trial.name
        make_folder(own)
        run = Training(
            job.model(recipe.seed, member.tail), parts["train"], parts.get("validation"), parts.get("test"),
            member.options(), own, job.objective.scorer, job.device,
            {
                "space": job.found.space.id,
                "tuner": recipe.tuner,
                "rows": job.version,
                "fold": recipe.fold,
                "chosen": own_options(job),
            },
            record=partial(write_recipe, own, job, member.options()),
        )  # fmt: skip
        # Equal options over one frozen end: the same function, but for the weights that are drawn from the seed.
        run.alike = digest_json([recipe.tuner, own_options(job), job.states, id(member.tail)])
        if _objective(job) != _objective(members[0].job):
            run.targets = {split: told for split in parts if (told := job.targets(split)) is not None}
        runs.append(run)
    ended = [_ended(end) for end in fit_all(runs, progress, judge=judge(runs))]
    batch = next(iter(parts["train"].epochs(0, 1))).to(members[0].job.device)
    taken: dict[str, float] = {}
    for member, run, end in zip(members, runs, ended, strict=True):
        label = member.trial.label
        if label not in taken:
            taken[label] = step_memory(run.model, run.view(batch, "train"), [member.tail])
        end["memory_bytes"] = taken[label]
    for source in parts.values():
        if isinstance(source, StoreSource):
            source.forget()  # no other pass reads it, and those to come keep blocks of their own
    return {member.trial.name: end for member, end in zip(members, ended, strict=True)}


def _objective(job: Job) -> tuple[str, Any]:
    return job.objective.name, job.objective.config


def _ended(end: dict[str, Any] | NotFinite) -> dict[str, Any]:
    return {"status": "diverged", "why": str(end)} if isinstance(end, NotFinite) else {"status": "done", **end}


def _found(
    trial: Trial, job: Job, folder: Path, member: Prepared | None, before: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What the run in `folder` ended with; None where it has not. `before`: its row in the table of a sweep before this
    one. UserError where it is another run."""
    file = folder / (BASELINE if member is None else "recipe.yaml")
    if not file.is_file():
        return None
    if member is None:
        same = json.loads(file.read_text(encoding="utf-8")) == _made_with(trial, job)
    else:
        wanted = resolved_recipe(member.job, member.options()).to_mapping()
        same = read_recipe(file, record=True) == wanted
        if same and (folder / "metrics.json").is_file():
            same = load_checkpoint(folder / TUNER)[1].get("rows") == member.job.version
    if not same:
        raise UserError(f"{folder} holds a run with other options or other rows: give another --out")
    beside = {name: before.get(name) for name in OF_SWEEP}
    if (folder / "metrics.json").is_file():
        ended = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return {"status": "done", **ended, **beside}
    diverged = before.get("status") == "diverged"
    return {"status": "diverged", "why": before["why"], **beside} if diverged else None


def _made_with(trial: Trial, job: Job) -> dict[str, Any]:
    """What a baseline's run is known by: its options, its rows, and the backbone with the inputs that it gets."""
    about = {"rows": job.version, "space": job.found.space.id}
    return {"baseline": trial.baseline, "preset": PRESET, "recipe": trial.recipe.to_mapping(), **about}


def _baseline(trial: Trial, job: Job, folder: Path) -> dict[str, Any]:
    """Train a baseline in the live backbone; its folder has metrics and a log, and is no run that predicts."""
    refuse_lost(folder)
    make_folder(folder)
    write_json(folder / BASELINE, _made_with(trial, job))
    try:
        made = fit_baseline(replace(trial.recipe, out=str(folder)), trial.baseline, PRESET)
    except NotFinite as error:
        return _ended(error)
    return _ended(made.metrics)


def _row(trial: Trial, folder: Path, end: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """A run's row of the table; `dev` and `score` are the figure `figure` that chooses the best epoch, None where it is
    undefined or not measured."""
    recipe, figure = trial.recipe, job.scorer().first
    dev, score = (finite((end.get(split) or {}).get(figure)) for split in ("validation", "test"))
    told = ("validation", "test", "best_epoch", "epochs", "steps", "stopped", "trainable_parameters", "seconds")
    again = replace(recipe, out=f"{folder / trial.name}-alone")
    return {
        "name": trial.name,
        "label": trial.label,
        "setting": dict(trial.setting),
        "seed": recipe.seed,
        "order_seed": recipe.ordering,
        "fold": recipe.fold,
        "run": str(folder / trial.name),
        "status": end["status"],
        "figure": figure,
        "dev": dev,
        "score": score,
        **{name: end.get(name) for name in (*told, "seconds_per_epoch", "why", *OF_SWEEP)},
        "command": _command(trial, again),
    }


def _command(trial: Trial, recipe: Recipe) -> str:
    """What trains it alone."""
    if not trial.baseline:
        return command_line("train", recipe)
    plain = replace(recipe, tuner=Recipe().tuner, seed=0)
    return " ".join(
        [command_line("compare", plain), *option("--tuners", trial.baseline), *option("--seeds", str(recipe.seed))]
    )
