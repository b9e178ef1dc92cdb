"""A table of the user's own as a task: CSV, TSV, JSON lines or CoNLL with one or two text columns and a label column.

Texts for a language model, in columns that say so, are another task: `completion`. Splits: see `splits`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.extract.tasks.base import Label, Rows, TargetType, Task, TaskError, TaskSpec
from pipeline.extract.tasks.captions import Paired, load_pairs
from pipeline.extract.tasks.completion import Asked, completion_fields, load_completions
from pipeline.extract.tasks.names import table_name
from pipeline.extract.tasks.sheet import WORDS, Sheet, read_sheet
from pipeline.extract.tasks.splits import Parted, part
from pipeline.extract.words import words_of

GRID_STEPS = 50  # a regression grid has at most this many steps
_TEXTS, _LABELS = ("text", "sentence", "words", "tokens"), ("label", "labels", "tags", "ner_tags")


def load_table(
    path: Path,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    separator: str | None = None,
    targets: Sequence[str] = (),
    validation: Path | None = None,
    test: Path | None = None,
    stratify: bool = False,
    metrics: Sequence[str] = (),
    name: str | None = None,
    continues: bool = False,
    columns: Sequence[str] = (),
    paired: Paired | None = None,
) -> Task:
    """The table at `path` as a task named after the file (or `name`). `columns`: what its columns are called, where its
    files have no line that says so.

    `text`, `text_pair`, `label`: column names; where not given, `text`, `sentence`, `words` or `tokens` and `label`,
    `labels`, `tags` or `ner_tags` are looked for; of a CoNLL file the first column has the words and the last the tags.
    A table without a label column has no targets. A text may be a list of words, which blanks then join.

    The type of target: lists of labels are tags where the text is a list of words, else classes; labels that hold
    several with `separator` between them are classes; else it is a number if all are numbers and one has a fraction,
    and a class if not. `targets`: types that will do, where another than this is meant; tags and classes may then be
    text with blanks or `separator` between them. Class names are those of `path`, sorted (by value where all are whole
    numbers). `stratify`: hold rows out by `stratified`. `metrics`: accuracy, or pearson and spearman, where not given.
    Text-to-text: prompt "NAME COLUMN: A COLUMN: B", texts to answer the class index, or an even grid over the range of
    the labels. A test file may come without labels. `continues`: the backbone goes on with texts, so that rows without
    labels are what it learns; see `completion_fields`. `paired`: several slots read the table, this is one; without
    labels its rows are pairs, see `captions`.

    Raises `TaskError` for: missing column, missing or unknown label, label that is not a finite number, one class only,
    other than one tag a word, too few rows to split, and all that `read_sheet` refuses.
    """
    if stratify and validation is not None:
        raise TaskError("--stratify: with --validation no rows are held out; leave one of the two out")
    train = read_sheet(path, list(columns) or None)
    if paired is not None and label is None and ("pair" in targets or not (targets or _found(train, _LABELS))):
        if separator or stratify or text_pair:
            raise TaskError(
                "rows of pairs have one column a slot and no label: leave out --separator, --stratify, --text-pair"
            )
        return load_pairs(path, train, text, paired, validation, test, name, columns)
    asked = Asked(text, targets, continues, others=any((text_pair, label, separator, metrics)))
    if texts := completion_fields(train.columns, _LABELS, asked):
        return load_completions(path, train, texts, validation, test, name, columns)
    reading = read_as(train, text, text_pair, label, separator, targets, stratify)
    parted = part(path, train, rows_of(reading), validation, test, stratify, columns)
    return made_task(table_name(name or path.stem), reading, parted, metrics)


def read_as(
    train: Sheet,
    text: str | None,
    text_pair: str | None,
    label: str | None,
    separator: str | None,
    targets: Sequence[str],
    stratify: bool,
) -> Reading:
    """How the columns of `train` become rows. Arguments and errors as of `load_table`."""
    path = train.path
    words = path.suffix.lower() in WORDS
    text = text or (train.columns[0] if words else _guess(train, _TEXTS, "--text"))
    label = label or (train.columns[-1] if words and len(train.columns) > 1 else _found(train, _LABELS))
    if label is None and targets and "none" not in targets:
        _guess(train, _LABELS, "--label")
    fields = (text, text_pair) if text_pair else (text,)
    given = train.column(label) if label else []
    for row, value in enumerate(given):
        if value is None or (value == "" and not separator):
            raise TaskError(f"{train.where(row)}: no label in column {label!r}; every training row needs one")
    target = _target(train, targets, given, train.column(text), separator) if label else "none"
    lists = any(isinstance(value, list) for value in given)
    if lists and separator:
        raise TaskError(f"{path}: --separator parts labels within a text, those in column {label!r} are lists")
    reading = Reading(fields, label or "", target, separator, lists)
    if target not in ("number", "none"):
        reading.classes = _class_names(train, reading, given)

    if stratify and target != "class":
        raise TaskError(f"{path}: --stratify needs one class a row; the type of the target here is {target}")
    return reading


def rows_of(reading: Reading) -> Callable[[Sheet, str], Rows]:
    """What makes the rows of a split of its sheet."""

    def make(sheet: Sheet, split: str) -> Rows:
        rows = _rows(sheet, reading)
        if split == "validation" and reading.label:
            _all_labelled(sheet, rows, reading.label)
        return rows

    return make


def made_task(name: str, reading: Reading, parted: Parted, metrics: Sequence[str]) -> Task:
    """The task of rows that were read and split."""
    spec = _spec(name, reading, parted.everything, tuple(metrics))
    more = {"label": reading.label or None, **({"separator": reading.separator} if reading.separator else {})}
    return Task(spec, parted.splits, {**parted.provenance, **more}, parted.absent)


@dataclass
class Reading:
    """How columns become rows. `classes`: names of classes or tags; `lists`: labels are lists, never text."""

    fields: tuple[str, ...]
    label: str
    target: TargetType
    separator: str | None
    lists: bool = False
    classes: tuple[str, ...] = ()


def _found(sheet: Sheet, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in sheet.columns), None)


def _guess(sheet: Sheet, names: Sequence[str], option: str) -> str:
    if found := _found(sheet, names):
        return found
    raise TaskError(f"{sheet.path}: name a column with {option}; columns there: {', '.join(sheet.columns)}")


def _label_text(sheet: Sheet, row: int, value: Any) -> str | None:
    """A label as text, None where it is missing."""
    if value is None or value == "":
        return None
    if isinstance(value, (str, int, float)):  # bool is an int: "True"
        return str(value)
    raise TaskError(f"{sheet.where(row)}: a label must be text or a number, not {type(value).__name__}")


def _labels_of(sheet: Sheet, row: int, value: Any, reading: Reading) -> list[str] | None:
    """The several labels of a row as text, None where they are missing."""
    if value is None or (value == "" and reading.target == "tags"):
        return None
    if isinstance(value, list):
        parts: Iterable[Any] = value
    elif reading.lists and value != "":
        raise TaskError(
            f"{sheet.where(row)}: {reading.label!r} is {value!r}, in other rows a list; make it one here too"
        )
    else:
        parts = [part.strip() for part in str(value).split(reading.separator)]
        parts = [part for part in parts if part]
    found = [_label_text(sheet, row, part) for part in parts]
    if None in found:
        raise TaskError(f"{sheet.where(row)}: a label in {reading.label!r} is empty")
    return [part for part in found if part is not None]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _target(
    sheet: Sheet, asked: Sequence[str], labels: list[Any], texts: list[Any], separator: str | None
) -> TargetType:
    """The type of target that the labels are of, of those asked for if any. TaskError where they are of none."""
    words = any(isinstance(text, list) for text in texts)
    if separator or any(isinstance(label, list) for label in labels):
        fitting: tuple[TargetType, ...] = ("classes", "tags") if separator or not words else ("tags", "classes")
    else:
        numbers = [_number(str(label)) for label in labels]
        fractions = [n for n in numbers if n is not None and not (math.isfinite(n) and n == int(n))]
        first: TargetType = "number" if fractions and None not in numbers else "class"
        fitting = (first, "number" if first == "class" else "class", "tags")
    if found := next((target for target in fitting if not asked or target in asked), None):
        return found
    if "classes" in asked:
        raise TaskError(f"{sheet.path}: each label is a single text; say what parts several ones: --separator ','")
    raise TaskError(f"{sheet.path}: the labels are of type {fitting[0]}, not {' or '.join(asked)}")


def _class_names(sheet: Sheet, reading: Reading, labels: list[Any]) -> tuple[str, ...]:
    if reading.target == "class":
        found = {text for row, value in enumerate(labels) if (text := _label_text(sheet, row, value)) is not None}
    else:
        found = {text for row, value in enumerate(labels) for text in _labels_of(sheet, row, value, reading) or ()}
    names = sorted(found)
    if all(re.fullmatch(r"-?\d{1,18}", n) for n in names):
        names.sort(key=int)
    if len(names) < 2 and reading.target != "classes":
        holds = f"a single class, {names[0]!r}" if names else "no class"
        raise TaskError(f"{sheet.path}: column {reading.label!r} holds {holds}; there is nothing to learn")
    return tuple(names)


def _rows(sheet: Sheet, reading: Reading) -> Rows:
    fields, label, classes = reading.fields, reading.label, reading.classes
    columns = [sheet.column(field) for field in fields]
    given: list[Any] = sheet.column(label) if label in sheet.columns else [None] * len(sheet)
    index = {name: i for i, name in enumerate(classes)}

    def place(row: int, text: str) -> int:
        if text not in index:
            few = ", ".join(classes[:20]) + (", …" if len(classes) > 20 else "")
            raise TaskError(f"{sheet.where(row)}: unknown label {text!r}; labels of the training rows: {few}")
        return index[text]

    rows = Rows([], [])
    if "id" in sheet.columns and "id" not in (*fields, label):
        rows.ids = ["" if value is None else str(value) for value in sheet.column("id")]
    for row, (values, value) in enumerate(zip(zip(*columns, strict=True), given, strict=True)):
        texts = tuple(cell_text(sheet, row, v, f) for v, f in zip(values, fields, strict=True))
        answer: Label = None
        if reading.target in ("classes", "tags"):
            several = _labels_of(sheet, row, value, reading)
            answer = None if several is None else [place(row, text) for text in several]
            if several is not None and reading.target == "tags" and len(several) != len(words_of(texts[0])):
                raise TaskError(f"{sheet.where(row)}: {len(several)} tags for {len(words_of(texts[0]))} words")
        elif reading.target != "none" and (text := _label_text(sheet, row, value)) is not None:
            if classes:
                answer = place(row, text)
            else:
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
    if isinstance(value, list) and value and all(isinstance(word, str) for word in value):
        if odd := next((word for word in value if re.search("[ \t\r\n]", word)), None):
            raise TaskError(f"{sheet.where(row)}: {odd!r} in {field!r} is no word: it has blanks in it")
        if "" in value:
            raise TaskError(f"{sheet.where(row)}: a word in {field!r} is empty")
        return " ".join(value)
    what = "is missing" if value is None else f"is {type(value).__name__}"
    raise TaskError(f"{sheet.where(row)}: {field!r} {what}, not text")


def _all_labelled(sheet: Sheet, rows: Rows, label: str) -> None:
    sheet.column(label)
    for row, value in enumerate(rows.labels):
        if value is None:
            raise TaskError(f"{sheet.where(row)}: no label in column {label!r}; every validation row needs one")


def _spec(name: str, reading: Reading, rows: Rows, metrics: tuple[str, ...]) -> TaskSpec:
    fields, classes, target = reading.fields, reading.classes, reading.target
    titles = [field.replace("{", "{{").replace("}", "}}") for field in fields]
    prompt = " ".join([name, *(f"{title}: {{{place}}}" for place, title in enumerate(titles))])
    if target == "class":
        texts = tuple(str(i) for i in range(len(classes)))
        return TaskSpec(name, target, classes, metrics or ("accuracy",), fields, prompt, texts)
    if target != "number":
        return TaskSpec(name, target, classes, metrics, fields, prompt)
    numbers = [float(label) for label in rows.labels if isinstance(label, float)]
    values, texts = regression_grid(min(numbers), max(numbers))
    return TaskSpec(name, target, (), metrics or ("pearson", "spearman"), fields, prompt, texts, values)


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
