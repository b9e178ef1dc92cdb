"""The eight GLUE tasks under the protocol of LST and SHERL (inherited from Compacter).

Prompt: the task's name, then each field under its own name ("rte sentence1: A sentence2: B"; mnli has no colon after
"hypothesis"). Targets: the class index as text; STS-B a number with one decimal. GLUE's test labels are not public, so
splits come from the labelled rows by `torch.randperm` with seed 42, whatever the run's seed:

    cola mrpc rte stsb   train = train;                validation, test = halves of GLUE's validation rows
    sst2 qqp qnli        train = train less 1,000;     validation = those 1,000; test = GLUE's validation rows
    mnli                 train = train;                validation = mismatched; test = matched

Rows are read from Hugging Face `datasets` (nyu-mll/glue) or from a folder in GLUE's own layout (RTE/train.tsv, …).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from pipeline.extract.tasks.base import Label, Rows, Task, TaskError, TaskSpec, fixed_order
from pipeline.extract.tasks.hub import read_hub
from pipeline.extract.tasks.sheet import Sheet, read_sheet

HUB_NAME = "nyu-mll/glue"
USUAL_GRID = 0.1  # spacing of the STS-B targets in the papers' code
HELD_OUT = 1000  # validation rows taken from a large training split


@dataclass(frozen=True)
class GlueTask:
    """One task of the benchmark: class names in Hugging Face's order, columns of the hub and of GLUE's own files."""

    name: str
    about: str
    folder: str
    prompt: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    fields: tuple[str, ...]
    splitting: Literal["halves", "held-out", "mnli"]
    licence: str
    columns: tuple[tuple[str, ...], ...] = ()  # names a field goes by in files, besides its own
    label_columns: tuple[str, ...] = ("label",)
    header: tuple[str, ...] | None = None  # column names of files without a header line
    drop_broken: bool = False  # leave out rows with a wrong number of fields, as the hub's own loader did


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

GLUE = {
    task.name: task
    for task in (
        GlueTask(
            "cola", "linguistic acceptability (Matthews)", "CoLA", "cola sentence: {0}",
            ("unacceptable", "acceptable"), ("matthews",), ("sentence",), "halves", "not stated (research use)",
            header=("source", "label", "star", "sentence"),
        ),
        GlueTask(
            "sst2", "sentiment of film reviews (accuracy)", "SST-2", "sst2 sentence: {0}",
            ("negative", "positive"), ("accuracy",), ("sentence",), "held-out", "not stated",
        ),
        GlueTask(
            "mrpc", "paraphrase of news sentences (F1, accuracy)", "MRPC", "mrpc sentence1: {0} sentence2: {1}",
            ("not_equivalent", "equivalent"), ("f1", "accuracy"), _PAIR, "halves", "not stated",
            columns=(("#1 String",), ("#2 String",)), label_columns=("label", "Quality"),
        ),
        GlueTask(
            "rte", "textual entailment (accuracy)", "RTE", "rte sentence1: {0} sentence2: {1}",
            _ENTAILMENT, ("accuracy",), _PAIR, "halves", "not stated",
        ),
        GlueTask(
            "stsb", "sentence similarity 0 to 5 (Pearson, Spearman)", "STS-B", "stsb sentence1: {0} sentence2: {1}",
            (), ("pearson", "spearman"), _PAIR, "halves", "CC BY-SA 4.0 (most sources)",
            label_columns=("score", "label"),
        ),
        GlueTask(
            "qqp", "duplicate questions (F1, accuracy)", "QQP", "qqp question1: {0} question2: {1}",
            ("not_duplicate", "duplicate"), ("f1", "accuracy"), ("question1", "question2"), "held-out", "not stated",
            label_columns=("is_duplicate", "label"), drop_broken=True,
        ),
        GlueTask(
            "qnli", "does the sentence answer the question (accuracy)", "QNLI", "qnli question: {0} sentence: {1}",
            _ENTAILMENT, ("accuracy",), ("question", "sentence"), "held-out", "CC BY-SA 4.0",
        ),
        GlueTask(
            "mnli", "entailment, neutral or contradiction (accuracy)", "MNLI", "mnli premise: {0} hypothesis {1}",
            ("entailment", "neutral", "contradiction"), ("accuracy",), ("premise", "hypothesis"), "mnli",
            "OANC and Creative Commons", columns=(("sentence1",), ("sentence2",)),
            label_columns=("label", "gold_label"),
        ),
    )
}  # fmt: skip


def load_glue(name: str, data: Path | None = None, grid: float = USUAL_GRID) -> Task:
    """The GLUE task `name` from `data`, a folder in GLUE's own layout, or from Hugging Face `datasets` where None.

    `grid`: spacing of the STS-B targets. 0.1 is what the official LST and SHERL code does (`np.round(x * 5 / 5, 1)`);
    0.2 is T5's own. Other tasks have none and refuse another than the usual. A split whose file is absent is listed in
    `Task.absent`.
    Raises `TaskError` for a missing folder or no network, and for anything wrong in a file.
    """
    task = GLUE[name]
    refuse_step(task, grid)
    spec = _spec(task, grid)
    if data is None:
        raw, revision = read_hub(HUB_NAME, name, task.fields)
        absent: dict[str, str] = {}
        files: dict[str, Any] = {"source": "hub"}
    else:
        raw, absent, revision, dropped = _read_folder(task, data)
        files = {"source": "folder", "rows_dropped": dropped} if dropped else {"source": "folder"}
    splits, missing = _split(task, raw, absent)
    for split, rows in splits.items():
        if not rows.labelled():
            raise TaskError(f"task {name}: a {split} row has no label; every row of the protocol needs one")
    provenance = {
        "dataset": f"glue/{name}", "revision": revision, "licence": task.licence, "splits": task.splitting, **files
    }  # fmt: skip
    return Task(spec, splits, provenance, missing)


def refuse_step(task: GlueTask, grid: float) -> None:
    """TaskError where `grid` is no spacing of the task's targets."""
    if grid != USUAL_GRID and task.labels:
        raise TaskError(f"task {task.name}: --target-step is for regression, and its labels are classes")
    if grid not in (0.1, 0.2):
        raise TaskError(f"task {task.name}: --target-step must be 0.1 or 0.2, not {grid:g}")


def _spec(task: GlueTask, grid: float) -> TaskSpec:
    if task.labels:
        targets = tuple(str(i) for i in range(len(task.labels)))
        return TaskSpec(
            task.name, "class", task.labels, task.metrics, task.fields, task.prompt, targets
        )  # fmt: skip
    values = tuple(float(v) for v in np.round(np.arange(round(5 / grid) + 1) * grid, 1))
    targets = tuple(f"{v:.1f}" for v in values)
    return TaskSpec(task.name, "number", (), task.metrics, task.fields, task.prompt, targets, values)


def _split(task: GlueTask, raw: dict[str, Rows], absent: dict[str, str]) -> tuple[dict[str, Rows], dict[str, str]]:
    """The protocol's splits from GLUE's own `train`, `validation` (mnli: two of them). Training rows are permuted, so
    that the first N are a fair mix."""
    made: dict[str, Rows] = {}
    missing: dict[str, str] = {}
    first, second = ("validation_matched", "validation_mismatched") if task.splitting == "mnli" else ("validation", "")
    sources = {
        "halves": {"train": "train", "validation": first, "test": first},
        "held-out": {"train": "train", "validation": "train", "test": first},
        "mnli": {"train": "train", "validation": second, "test": first},
    }[task.splitting]
    for split, source in sources.items():
        if source not in raw:
            missing[split] = absent[source]
            continue
        rows = raw[source]
        if source == "train":
            held = HELD_OUT if task.splitting == "held-out" else 0
            if held and len(rows) <= held:
                missing[split] = f"{task.folder}'s train file has {len(rows)} rows and {held} are held out of it"
                continue
            order = fixed_order(len(rows))
            made[split] = rows.take(order[held:] if split == "train" else order[:held])
        elif task.splitting == "halves":
            order, half = fixed_order(len(rows)), len(rows) // 2
            made[split] = rows.take(order[:half] if split == "validation" else order[half:])
        else:
            made[split] = rows
    return made, missing


def _read_folder(task: GlueTask, data: Path) -> tuple[dict[str, Rows], dict[str, str], str, int]:
    folder = _task_folder(task, data)
    stems = {"train": "train", "validation": "dev"}
    if task.splitting == "mnli":
        stems = {"train": "train", "validation_matched": "dev_matched", "validation_mismatched": "dev_mismatched"}
    raw: dict[str, Rows] = {}
    absent: dict[str, str] = {}
    digest = xxhash.xxh3_128()
    dropped = 0
    for source, stem in stems.items():
        names = [f"{stem}.tsv", f"{stem}.jsonl"]
        path = next((folder / n for n in names if (folder / n).is_file()), None)
        if path is None:
            absent[source] = f"there is no {' or '.join(names)} in {folder}"
            continue
        header = list(task.header) if task.header and path.suffix == ".tsv" else None
        sheet = read_sheet(path, header, task.drop_broken)
        raw[source] = _rows(task, sheet)
        digest.update(f"{path.name}:{sheet.digest};".encode())
        dropped += sheet.dropped
    if not raw:
        raise TaskError(f"task {task.name}: {folder} holds no labelled rows: {'; '.join(absent.values())}")
    return raw, absent, digest.hexdigest(), dropped


def _task_folder(task: GlueTask, data: Path) -> Path:
    """`data`/RTE, or `data` itself where that is the task's folder already. Case does not matter."""
    if not data.is_dir():
        raise TaskError(f"no such folder: {data}; --data names a folder in GLUE's layout, with {task.folder}/ in it")
    for path in (data, *sorted(data.iterdir())):
        if path.is_dir() and path.name.lower() in (task.folder.lower(), task.name):
            return path
    there = ", ".join(sorted(p.name for p in data.iterdir() if p.is_dir())) or "none"
    raise TaskError(f"task {task.name}: no folder {task.folder} in {data}; folders there: {there}")


def _rows(task: GlueTask, sheet: Sheet) -> Rows:
    also = task.columns or tuple(() for _ in task.fields)
    fields = [
        sheet.column(_named(sheet, (field, *others))) for field, others in zip(task.fields, also, strict=True)
    ]  # fmt: skip
    given = sheet.column(_named(sheet, task.label_columns))
    texts: list[tuple[str, ...]] = []
    labels: list[Label] = []
    for row, (values, label) in enumerate(zip(zip(*fields, strict=True), given, strict=True)):
        if not all(isinstance(v, str) for v in values):
            raise TaskError(f"{sheet.where(row)}: {' and '.join(task.fields)} must be text")
        if label == "-":  # no gold label: the annotators of MultiNLI did not agree
            continue
        texts.append(values)
        labels.append(_score(sheet, row, label) if not task.labels else _class(task, sheet, row, label))
    return Rows(texts, labels)


def _named(sheet: Sheet, names: Sequence[str]) -> str:
    return next((n for n in names if n in sheet.columns), names[0])


def _class(task: GlueTask, sheet: Sheet, row: int, label: Any) -> int:
    """Files give a class by name or by index; -1 marks an unlabelled row, which no file of the protocol may hold."""
    text = str(label)
    if text in task.labels:
        return task.labels.index(text)
    if text in ("-1", "") or label is None:
        raise TaskError(f"{sheet.where(row)}: no label; every row of this file needs one of {', '.join(task.labels)}")
    if text.isdecimal() and int(text) < len(task.labels):
        return int(text)
    raise TaskError(f"{sheet.where(row)}: unknown label {text!r}; labels of {task.name}: {', '.join(task.labels)}")


def _score(sheet: Sheet, row: int, label: Any) -> float:
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = float("nan")
    if not 0 <= value <= 5:
        raise TaskError(f"{sheet.where(row)}: score {label!r} is not a number from 0 to 5")
    return value
