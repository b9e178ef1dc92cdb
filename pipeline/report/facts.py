"""What a report is made of: runs and tables read from their files, and what a run does on a split of its store."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import stats
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from pipeline.commands.sweep_table import SWEEP
from pipeline.extract.batch import Batch
from pipeline.jobs.job import Job
from pipeline.lookup.task import picture_root
from pipeline.option_names import option_name
from pipeline.recipe import Recipe, read_recipe
from pipeline.report.looks import Clock, Maps, cost_facts, maps_of
from pipeline.runs import Run, load_run
from pipeline.store import Segment, Space
from pipeline.store.errors import UserError
from pipeline.terminal import size_text
from pipeline.train.evaluate import closing, predict
from pipeline.train.learned import Learned
from pipeline.train.metrics import smaller_is_better

MISTAKES = 12  # shown of each run
THUMBNAIL = 128  # pixels of an image's longer side
LOOKED_AT = 16  # batches that what was learned is averaged over
_SEEDS = ("seed", "order_seed", "out", "overwrite")  # options that repeat a run rather than make another


def selecting(figures: Iterable[str]) -> str:
    """Of the figures of a split the one that selects the best epoch: their average where it is one of several, of those
    that retrieval usually has their sum, else the first that was asked for; "" where there are none."""
    names = list(figures)
    if "rsum" in names and any(name.endswith("_median") for name in names):
        return "rsum"
    return "average" if "average" in names and len(names) != 2 else next((n for n in names if n != "average"), "")


@dataclass
class Shown:
    """One run as a report shows it. `label`: what it has in common with its other seeds; `score`: the figure of the
    test split, else of validation, that the task is judged by; `steps` and `scores`: its log."""

    label: str
    seed: int
    folder: Path
    recipe: dict[str, Any]
    metrics: dict[str, Any]
    memory: float | None = None  # bytes of a training step, where a sweep has counted them
    steps: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)

    @property
    def split(self) -> str:
        return "test" if self.metrics.get("test") else "validation"

    @property
    def dev(self) -> float:
        """What chooses among settings, larger is better; NaN where there is no validation split."""
        figures = self.metrics.get("validation") or {}
        name = selecting(figures)
        value = figures.get(name)
        return math.nan if value is None else -value if smaller_is_better(name) else value


@dataclass
class Setting:
    """Runs that differ in their seed alone, or a row of a `compare` table. `means` and `spreads`: by figure; a spread
    is half of the 95 % interval over seeds by Student's t, None with one seed."""

    label: str
    seeds: int
    means: dict[str, float]
    spreads: dict[str, float | None]
    parameters: int | None = None
    seconds: float | None = None
    memory: float | None = None
    runs: list[Shown] = field(default_factory=list)
    about: str = ""  # of a row of a table: what it was made with


@dataclass
class Classes:
    """`matrix` (classes, classes): rows are the truth. `rows`: name, precision, recall, F1, samples of each class."""

    names: list[str]
    matrix: np.ndarray
    rows: list[tuple[str, float, float, float, int]]


@dataclass
class Details:
    """What a run does on `split`. `mistakes`: text fields, truth, prediction and the probability of it, or the error of
    a number, worst first. `pairs`: (truth, prediction) of numbers. `others`: of other targets the rows of the
    objective's own report. `costs`: of inference and training. `missing`: why there is nothing to show."""

    shown: Shown
    split: str = ""
    classes: Classes | None = None
    pairs: list[tuple[float, float]] = field(default_factory=list)
    mistakes: list[dict[str, Any]] = field(default_factory=list)
    wrong: int = 0
    samples: int = 0
    others: list[dict[str, Any]] = field(default_factory=list)
    learned: list[Learned] = field(default_factory=list)
    maps: Maps | None = None
    costs: list[tuple[str, str]] = field(default_factory=list)
    store: list[tuple[str, str]] = field(default_factory=list)
    missing: str = ""


def run_folders(path: Path) -> list[Path]:
    """The run folders in what was given: itself, the runs of a sweep, or those in it or in its `runs`."""
    if (path / "recipe.yaml").is_file():
        return [path]
    found = sorted(file.parent for file in (*path.glob("*/recipe.yaml"), *path.glob("runs/*/recipe.yaml")))
    return [folder for folder in found if (folder / "metrics.json").is_file()]


def read_runs(folders: Sequence[Path], rows: Mapping[Path, Mapping[str, Any]]) -> list[Shown]:
    """The finished runs in `folders`; `rows`: of those that stand in a sweep's table. The others are called by their
    tuner and by the options in which they differ from each other."""
    recipes = {folder: read_recipe(folder / "recipe.yaml") for folder in folders}
    plain = {f: {k: v for k, v in _flat(r).items() if k not in _SEEDS} for f, r in recipes.items()}
    shown = []
    for folder in folders:
        file = folder / "metrics.json"
        if not file.is_file():
            raise UserError(f"{folder}: the run is not finished: give its command again, or leave it out")
        try:
            metrics = json.loads(file.read_text(encoding="utf-8"))
            lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
            log = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: its files cannot be read ({error}): copy the run anew") from None
        alike = [o for o in plain.values() if o.get("tuner") == plain[folder].get("tuner")]
        own = [(k, v) for k, v in plain[folder].items() if any(o.get(k) != v for o in alike)]
        told = [option_name(k)[2:] + ("" if v is True else f"={_text(v)}") for k, v in own if v not in (None, False)]
        label = " ".join([str(recipes[folder]["tuner"]), *told])
        steps = [entry for entry in log if "loss" in entry]
        scores = [entry for entry in log if "validation" in entry]
        seed, row = int(recipes[folder].get("seed", 0)), rows.get(folder, {})
        label, memory = _in_sweep(folder, plain, rows) or label, row.get("memory_bytes")
        label += ", stopped early as a loser" if metrics.get("stopped") == "halving" else ""
        shown.append(Shown(label, seed, folder, recipes[folder], metrics, memory, steps, scores))
    return shown


def _in_sweep(folder: Path, plain: Mapping[Path, Mapping[str, Any]], rows: Mapping[Path, Mapping[str, Any]]) -> str:
    """What its sweep calls a run; another sweep's of that name have what differs beside it, the folds by their number.
    "" of a run that stands in no sweep."""
    if folder not in rows:
        return ""
    label = str(rows[folder]["label"])
    same = {
        f: {**p, "fold": str(p.get("fold") or "").split("/")[-1] or None}
        for f, p in plain.items()
        if f in rows and rows[f]["label"] == label
    }
    own = [(k, v) for k, v in same[folder].items() if any(o.get(k) != v for o in same.values())]
    return " ".join([label, *(f"{'folds' if k == 'fold' else option_name(k)[2:]}={_text(v)}" for k, v in own if v)])


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    own = {k: v for k, v in recipe.items() if not k.endswith("_options")}
    return {**own, **recipe.get("tuner_options", {}), **recipe.get("objective_options", {})}


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def sweep_rows(path: Path) -> dict[Path, dict[str, Any]]:
    """Run folder → row of the table of the sweep in `path`; it may have been moved with its runs."""
    file = path / SWEEP
    if not file.is_file():
        return {}
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["runs"]
        return {path / row["name"]: {**row, "label": str(row["label"])} for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is no sweep's table ({error})") from None


def settings_of(runs: Sequence[Shown]) -> list[Setting]:
    """Runs by label."""
    found = []
    for label in dict.fromkeys(run.label for run in runs):
        own = [run for run in runs if run.label == label]
        values: dict[str, list[float]] = {}
        for run in own:
            for split in ("validation", "test"):
                for name, value in (run.metrics.get(split) or {}).items():
                    if value is not None:
                        values.setdefault(f"{split} {name}", []).append(float(value))
        means = {name: statistics.mean(v) for name, v in values.items()}
        spreads = {name: interval(v) for name, v in values.items()}
        seconds = min(run.metrics["seconds_per_epoch"] for run in own)
        parameters = own[0].metrics["trainable_parameters"]
        memory = max((run.memory for run in own if run.memory), default=None)
        found.append(Setting(label, len(own), means, spreads, parameters, seconds, memory, own))
    return found


def interval(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean, by Student's t; None with one value."""
    if len(values) < 2:
        return None
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def read_table(path: Path) -> list[Setting]:
    """The rows of a table that `pipeline compare` wrote, as CSV or by --json. UserError for anything else."""
    try:
        if path.suffix.lower() == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        else:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        found = []
        for row in rows:
            spread = float(row["spread"]) if row.get("spread") not in (None, "") else None
            seeds = int(row["seeds"])
            if spread is not None:
                spread *= float(stats.t.ppf(0.975, seeds - 1)) / math.sqrt(seeds)
            live = " (live)" if str(row.get("live")) == "True" else ""
            figure = str(row.get("figure") or "average")
            figure = "metric" if figure == "average" else figure
            found.append(
                Setting(
                    str(row["method"]) + live, seeds, {figure: float(row["metric"])}, {figure: spread},
                    int(row["trainable"]), float(row["seconds_per_epoch"]), float(row["memory_bytes"]),
                    about=str(row.get("settings") or ""),
                )
            )  # fmt: skip
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a table of `pipeline compare` ({type(error).__name__}: {error}): give its --csv file, what "
            "--json printed, a run, or a sweep's folder"
        ) from None
    if not found:
        raise UserError(f"{path}: the table has no rows")
    return found


def details(shown: Shown, **elsewhere: Any) -> Details:
    """What the run does on its test split, else on validation, from the store; where that is not at hand, why."""
    out = Details(shown)
    try:
        run = load_run(shown.folder, **elsewhere)
    except UserError as error:
        out.missing = str(error)
        return out
    job = run.job
    if not isinstance(job, Job):
        out.missing = (
            "a run of several backbones or tasks: its scores are above, its predictions `pipeline predict` tells"
        )
        return out
    out.split = next((s for s in ("test", "validation") if s in job.tables and job.targets(s) is not None), "")
    out.store = store_facts(job)
    if not out.split:
        out.missing = f"the store has no rows of {job.spec.name} with labels to look at"
        return out
    source, clock = job.source(out.split), Clock(job.device)
    if job.spec.target in ("class", "number"):
        with clock.measured():
            entries = predict(run.model, source, job.device, job.recipe.train_precision)
        _compare(out, job, entries)
    else:
        with clock.measured():
            out.others = _reported(run, out.split)
        out.samples = len(job.tables[out.split].keys)
    run.model.eval()
    with torch.inference_mode(), closing(source.sequential()) as batches:
        out.learned = run.model.tuner.insights(_on(batches, job.device))
    if job.spec.target == "class":
        with closing(source.sequential()) as batches:
            out.maps = maps_of(run.model, (batch.to(job.device) for batch in batches), job.spec.labels)
    out.costs = cost_facts(job, run.model, out.split, clock, out.samples)
    return out


def _reported(run: Run, split: str) -> list[dict[str, Any]]:
    """The rows of `evaluate --report`; none where the objective has no report."""
    if run.single().objective.report() is None:
        run.evaluate(split)
        return []
    return [dict(row) for row in run.evaluate(split, True)["report"]["rows"]]


def _on(batches: Iterable[Batch], device: torch.device) -> Iterable[Batch]:
    return (batch.to(device) for batch in islice(batches, LOOKED_AT))


def _compare(out: Details, job: Job, entries: Sequence[Mapping[str, Any]]) -> None:
    """Predictions beside the truth: a class's confusion, or a number's pairs, and the worst mistakes."""
    table, spec = job.tables[out.split], job.spec
    out.samples = len(entries)
    if spec.target == "number":
        truth = [float(label) for label in table.labels]
        guess = [float(entry["label"]) for entry in entries]
        out.pairs = list(zip(truth, guess, strict=True))
        wrong = [(abs(t - g), i, t, g) for i, (t, g) in enumerate(out.pairs)]
        worst = sorted(wrong, reverse=True)[:MISTAKES]
        out.mistakes = [_mistake(job, table.texts[i], f"{t:g}", f"{g:.3g}", e) for e, i, t, g in worst]
        return
    names = list(spec.labels)
    truth_at = [int(label) for label in table.labels]
    guess_at = [names.index(str(entry["label"])) for entry in entries]
    matrix = confusion_matrix(truth_at, guess_at, labels=range(len(names)))
    figures = precision_recall_fscore_support(truth_at, guess_at, labels=range(len(names)), zero_division=0.0)
    columns = zip(*(np.asarray(column).tolist() for column in figures), strict=True)
    rows = [(name, p, r, f, int(n)) for name, (p, r, f, n) in zip(names, columns, strict=True)]
    out.classes = Classes(names, matrix, rows)
    misses = [
        (float(entry.get("probability", 1.0)), i)
        for i, (entry, t, g) in enumerate(zip(entries, truth_at, guess_at, strict=True)) if t != g
    ]  # fmt: skip
    out.wrong = len(misses)
    for chance, i in sorted(misses, reverse=True)[:MISTAKES]:
        out.mistakes.append(_mistake(job, table.texts[i], names[truth_at[i]], names[guess_at[i]], chance))


def _mistake(job: Job, texts: Sequence[str], truth: str, guess: str, how: float) -> dict[str, Any]:
    """A sample's fields (an image as a small image where its file is at hand), truth and prediction."""
    shown = {"texts": dict(zip(job.spec.fields, texts, strict=False)), "truth": truth, "guess": guess, "how": how}
    if job.found.backbone.modality == "image":
        try:
            with Image.open(Path(picture_root(job.recipe)) / texts[0]) as picture:
                small = picture.convert("RGB")
                small.thumbnail((THUMBNAIL, THUMBNAIL))
                data = io.BytesIO()
                small.save(data, "JPEG", quality=80)
        except (OSError, ValueError):
            return shown
        shown["image"] = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
    return shown


def store_facts(job: Job) -> list[tuple[str, str]]:
    """What the run's feature space holds and what it took: name, value."""
    space = job.found.space
    if not isinstance(space, Space):
        return []
    segments = space.segments()
    machines = dict.fromkeys(str(s.provenance.get("device", {}).get("name", "")) for s in segments)
    identity = space.identity
    rows = ", ".join(f"{len(table.keys):,} {split}" for split, table in job.tables.items())
    facts = [
        ("feature space", space.id[:12]),
        ("backbone", ", ".join(job.found.source["names"])),
        ("rows", rows),
        ("samples stored", f"{sum(len(s) for s in segments):,} in {len(segments):,} segments"),
        ("states stored", ", ".join(sorted({name for s in segments for name in s.states}))),
        ("states this run reads", ", ".join(job.states)),
        ("number format", f"{identity['format']}, computed in {identity['precision']}"),
        ("bytes", _bytes_text(segments)),
        ("written", _written_text(segments)),
    ]
    return [*facts, ("computed on", ", ".join(name for name in machines if name))]


def _bytes_text(segments: Sequence[Segment]) -> str:
    size, samples = sum(s.nbytes for s in segments), sum(len(s) for s in segments if s.base is None)
    return f"{size_text(size)}, {size_text(size / max(1, samples))} a sample"


def _written_text(segments: Sequence[Segment]) -> str:
    when = sorted(s.created for s in segments)
    return f"{when[0]} to {when[-1]}" if when and when[0] != when[-1] else "".join(when[:1])


def recipe_lines(run: Shown) -> list[tuple[str, str]]:
    """The options of a run that are not left open."""
    usual = Recipe().to_mapping()
    flat = {k: v for k, v in _flat(run.recipe).items() if v is not None and v != usual.get(k, [])}
    return [(option_name(k)[2:], _text(v)) for k, v in flat.items()]
