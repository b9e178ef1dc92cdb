"""A table of the user's own as a task: CSV, TSV or JSON lines with one or two text columns and a label column.

Splits: separate files where given. Where neither a validation nor a test file is given, a tenth of the rows each is
held out by the fixed permutation (seed 42, whatever the run's seed), so that a table always splits the same way. With a
test file alone, only validation rows are held out; with a validation file alone there is no test split.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import xxhash

from pipeline.extract.tasks.base import Label, Rows, Task, TaskError, TaskSpec, fixed_order
from pipeline.extract.tasks.glue import GLUE
from pipeline.extract.tasks.sheet import Sheet, read_sheet

HELD_OUT = 0.1  # share of the rows, each, for validation and test
GRID_STEPS = 50  # a regression grid has at most this many steps

Kind = Literal["classification", "regression"]


def load_table(
    path: Path,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    kind: str | None = None,
    validation: Path | None = None,
    test: Path | None = None,
    metrics: Sequence[str] = (),
    name: str | None = None,
) -> Task:
    """The table at `path` as a task named after the file (or `name`).

    `text`, `text_pair`, `label`: column names; where not given, `text` or `sentence` and `label` are looked for.
    `kind`: classification, or regression; where not given, regression if all labels are numbers and one has a fraction.
    Class names are those of `path`, sorted (by value where all are whole numbers). `metrics`: accuracy, or pearson and
    spearman, where not given. Text-to-text: prompt "NAME COLUMN: A COLUMN: B", targets the class index as text, or an
    even grid over the range of the labels. A test file may come without labels.

    Raises `TaskError` for: missing column, missing or unknown label, label that is not a finite number, one class only,
    too few rows to split, and all that `read_sheet` refuses.
    """
    train = read_sheet(path)
    text = text or _guess(train, ("text", "sentence"), "--text")
    label = label or _guess(train, ("label",), "--label")
    fields = (text, text_pair) if text_pair else (text,)
    name = table_name(name or path.stem)
    given = [_label_text(train, row, value) for row, value in enumerate(train.column(label))]
    for row, value in enumerate(given):
        if value is None:
            raise TaskError(f"{train.where(row)}: no label in column {label!r}; every training row needs one")
    answers = [value for value in given if value is not None]
    chosen = _kind(kind, answers)
    classes = _class_names(train, label, answers) if chosen == "classification" else ()

    def rows_of(sheet: Sheet) -> Rows:
        return _rows(sheet, fields, label, classes)

    everything = rows_of(train)
    order = fixed_order(len(everything))
    splits: dict[str, Rows] = {}
    absent: dict[str, str] = {}
    parts = {"train": train.digest}
    if validation is not None:
        sheet = read_sheet(validation)
        splits["validation"], parts["validation"] = rows_of(sheet), sheet.digest
        _all_labelled(sheet, splits["validation"], label)
        held = 0
    else:
        held = max(1, int(len(everything) * HELD_OUT))
        if len(everything) < (3 if test is None else 2):
            raise TaskError(f"{path} has {len(everything)} rows, too few to hold any out; add rows")
        splits["validation"] = everything.take(order[:held])
    if test is not None:
        sheet = read_sheet(test)
        splits["test"], parts["test"] = rows_of(sheet), sheet.digest
    elif validation is None:
        splits["test"] = everything.take(order[held : 2 * held])
        held *= 2
    else:
        absent["test"] = "a validation file was given and no test file; give one with --test FILE"
    splits["train"] = everything.take(order[held:])

    spec = _spec(name, chosen, classes, fields, everything, tuple(metrics))
    revision = train.digest if len(parts) == 1 else xxhash.xxh3_128_hexdigest(repr(sorted(parts.items())).encode())
    provenance = {
        "dataset": path.name, "revision": revision, "licence": "not stated", "source": "table",
        "splits": "files" if validation is not None and test is not None else "held-out",
        "files": parts, "label": label,
    }  # fmt: skip
    return Task(spec, {s: splits[s] for s in ("train", "validation", "test") if s in splits}, provenance, absent)


def _guess(sheet: Sheet, names: Sequence[str], option: str) -> str:
    for name in names:
        if name in sheet.columns:
            return name
    raise TaskError(f"{sheet.path}: name a column with {option}; columns there: {', '.join(sheet.columns)}")


def table_name(stem: str) -> str:
    """What a table is called as a task: its file's stem in letters, digits, - and _; never the name of a GLUE task."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_") or "table"
    return f"{name}-table" if name in GLUE else name


def _label_text(sheet: Sheet, row: int, value: Any) -> str | None:
    """A label as text, None where it is missing."""
    if value is None or value == "":
        return None
    if isinstance(value, (str, int, float)):  # bool is an int: "True"
        return str(value)
    raise TaskError(f"{sheet.where(row)}: a label must be text or a number, not {type(value).__name__}")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _kind(kind: str | None, labels: list[str]) -> Kind:
    if kind is not None:
        if kind not in ("classification", "regression"):
            raise TaskError(f"kind must be classification or regression, not {kind!r}")
        return "classification" if kind == "classification" else "regression"
    numbers = [_number(label) for label in set(labels)]
    fractions = [n for n in numbers if n is not None and not (math.isfinite(n) and n == int(n))]
    return "regression" if fractions and None not in numbers else "classification"


def _class_names(sheet: Sheet, label: str, labels: list[str]) -> tuple[str, ...]:
    names = sorted(set(labels))
    if all(re.fullmatch(r"-?\d{1,18}", n) for n in names):
        names.sort(key=int)
    if len(names) == 1:
        raise TaskError(f"{sheet.path}: column {label!r} holds a single class, {names[0]!r}; there is nothing to learn")
    return tuple(names)


def _rows(sheet: Sheet, fields: Sequence[str], label: str, classes: tuple[str, ...]) -> Rows:
    columns = [sheet.column(field) for field in fields]
    given: list[Any] = sheet.column(label) if label in sheet.columns else [None] * len(sheet)
    index = {name: i for i, name in enumerate(classes)}
    rows = Rows([], [])
    for row, (values, value) in enumerate(zip(zip(*columns, strict=True), given, strict=True)):
        texts = tuple(cell_text(sheet, row, v, f) for v, f in zip(values, fields, strict=True))
        text = _label_text(sheet, row, value)
        answer: Label = None
        if text is not None and classes:
            if text not in index:
                few = ", ".join(classes[:20]) + (", …" if len(classes) > 20 else "")
                raise TaskError(f"{sheet.where(row)}: unknown label {text!r}; labels of the training rows: {few}")
            answer = index[text]
        elif text is not None:
            answer = _number(text)
            if answer is None or not math.isfinite(answer):
                raise TaskError(f"{sheet.where(row)}: label {text!r} is not a finite number, as regression needs")
        rows.texts.append(texts)
        rows.labels.append(answer)
    return rows


def cell_text(sheet: Sheet, row: int, value: Any, field: str) -> str:
    """A cell as the text that a backbone reads. Raises TaskError naming the row for what is missing or no text."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return str(value)
    what = "is missing" if value is None else f"is {type(value).__name__}"
    raise TaskError(f"{sheet.where(row)}: {field!r} {what}, not text")


def _all_labelled(sheet: Sheet, rows: Rows, label: str) -> None:
    sheet.column(label)
    for row, value in enumerate(rows.labels):
        if value is None:
            raise TaskError(f"{sheet.where(row)}: no label in column {label!r}; every validation row needs one")


def _spec(
    name: str, kind: Kind, classes: tuple[str, ...], fields: tuple[str, ...], rows: Rows, metrics: tuple[str, ...]
) -> TaskSpec:
    titles = [field.replace("{", "{{").replace("}", "}}") for field in fields]
    prompt = " ".join([name, *(f"{title}: {{{place}}}" for place, title in enumerate(titles))])
    if kind == "classification":
        targets = tuple(str(i) for i in range(len(classes)))
        return TaskSpec(name, kind, classes, metrics or ("accuracy",), fields, prompt, targets)
    numbers = [float(label) for label in rows.labels if label is not None]
    values, targets = regression_grid(min(numbers), max(numbers))
    return TaskSpec(name, kind, (), metrics or ("pearson", "spearman"), fields, prompt, targets, values)


def regression_grid(low: float, high: float) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """Evenly spaced values that cover low … high, and their text. The step is 1, 2 or 5 times a power of ten, the
    smallest that needs at most 50 steps. Raises `TaskError` where low equals high."""
    if not high > low:
        raise TaskError(f"every regression label is {low:g}; there is nothing to learn")
    power = math.floor(math.log10((high - low) / GRID_STEPS))
    for exponent in (power, power + 1):
        for digit in (1, 2, 5):
            step = digit * 10.0**exponent
            first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
            if last - first <= GRID_STEPS:
                places = max(0, -exponent)
                values = tuple(round(i * step, places) for i in range(first, last + 1))
                return values, tuple(f"{v:.{places}f}" for v in values)
    raise TaskError(f"cannot lay a grid over labels from {low:g} to {high:g}")
