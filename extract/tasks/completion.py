"""Texts for a language model as a task: JSON lines `{"prompt", "completion"}`, `{"messages": […]}` or `{"text"}`, any
table with a column of texts, a Hugging Face dataset of texts (hub:DATASET).

Rows have no target of their own: what is learned are tokens of the texts, see `extract.completion`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.extract.completion import Form
from pipeline.extract.tasks.base import Rows, Task, TaskError, TaskSpec
from pipeline.extract.tasks.hub import fetch
from pipeline.extract.tasks.hub_images import hub_name
from pipeline.extract.tasks.names import table_name
from pipeline.extract.tasks.sheet import Sheet
from pipeline.extract.tasks.splits import hold_out, part
from pipeline.store.format.digest import digest_json

CHAT, ANSWERED = ("messages",), ("prompt", "completion")


@dataclass(frozen=True)
class Asked:
    """What is asked of a table beside its file. `objective`: types of target that will do, () for any; `continues`: the
    backbone goes on with texts, so that rows without a label are such; `others`: options that only labels have."""

    text: str | None = None
    targets: Sequence[str] = ()
    continues: bool = False
    others: bool = False


def form_of(spec: TaskSpec) -> Form:
    """What the rows of a completion task are: text, completion or messages; "plain" for any other task."""
    if spec.target != "tokens":
        return "plain"
    return "messages" if spec.fields == CHAT else "completion" if spec.fields == ANSWERED else "text"


def completion_fields(columns: Sequence[str], labels: Sequence[str], asked: Asked) -> tuple[str, ...]:
    """The columns that are the texts of a completion task; () where a table is another task. `labels`: what a column of
    labels is called."""
    if asked.others or (asked.targets and "tokens" not in asked.targets):
        return ()
    for fields in (CHAT, ANSWERED):
        if asked.text is None and set(fields) <= set(columns):
            return fields
    meant = "tokens" in asked.targets or (asked.continues and not set(labels) & set(columns))
    text = asked.text or ("text" if "text" in columns else None)
    return (text,) if meant and text is not None else ()


def load_completions(
    path: Path,
    table: Sheet,
    fields: tuple[str, ...],
    validation: Path | None,
    test: Path | None,
    name: str | None,
    columns: Sequence[str] = (),
) -> Task:
    """The rows of `table`, read from `path`, as a completion task. Raises `TaskError` naming the row whose text is
    missing, or whose messages are none."""
    parted = part(path, table, lambda sheet, split: _rows(sheet, fields), validation, test, columns=columns)
    return _task(table_name(name or path.stem), fields, parted.splits, parted.absent, parted.provenance)


def load_hub_texts(task: str, text: str | None) -> Task:
    """The task of `hub:DATASET`: the columns of a completion task of its split `train`, and of `validation` and `test`
    where it has them. Raises `TaskError` where it cannot be fetched or has no such columns."""
    found = fetch(task)
    columns = list(found["train"].column_names)
    fields = completion_fields(columns, (), Asked(text, continues=True))
    if not fields:
        raise TaskError(f"{task}: name a column of texts with --text; columns there: {', '.join(columns)}")
    made = {}
    for split, rows in found.items():
        values = [list(rows[field]) for field in fields]
        lines = list(range(1, len(rows) + 1))
        sheet = Sheet(
            Path(f"{task} {split}"), list(fields), [list(row) for row in zip(*values, strict=True)], lines, ""
        )
        made[split] = _rows(sheet, fields)
    splits, absent = hold_out(made.pop("train"), made, task)
    digest = digest_json([list(rows.texts) for rows in splits.values()])
    about = {"dataset": task, "revision": digest, "licence": "not stated", "source": "hub", "splits": sorted(found)}
    return _task(hub_name(task), fields, splits, absent, about)


def _task(
    name: str, fields: tuple[str, ...], splits: dict[str, Rows], absent: dict[str, str], provenance: dict[str, Any]
) -> Task:
    spec = TaskSpec(name, "tokens", (), (), fields, "")
    return Task(spec, splits, {**provenance, "learn": list(fields)}, absent)


def _rows(sheet: Sheet, fields: tuple[str, ...]) -> Rows:
    columns = [sheet.column(field) for field in fields]
    read = conversation_text if fields == CHAT else _text
    texts = [
        tuple(read(sheet, row, value, field) for value, field in zip(values, fields, strict=True))
        for row, values in enumerate(zip(*columns, strict=True))
    ]
    ids = ["" if value is None else str(value) for value in sheet.column("id")] if "id" in sheet.columns else []
    return Rows(texts, [None] * len(texts), ids)


def _text(sheet: Sheet, row: int, value: Any, field: str) -> str:
    if not isinstance(value, str):
        what = "is missing" if value is None else f"is {type(value).__name__}"
        raise TaskError(f"{sheet.where(row)}: {field!r} {what}, not text")
    return value


def conversation_text(sheet: Sheet, row: int, value: Any, field: str) -> str:
    """The messages in a cell as JSON, which is how a task has them."""
    text = json.dumps(conversation(sheet, row, value, field), ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TaskError(f"{sheet.where(row)}: {field!r} holds half a surrogate pair, which is no character") from None
    return text


def conversation(sheet: Sheet, row: int, value: Any, field: str, answered: bool = True) -> list[dict[str, Any]]:
    """The messages in a cell, each with a role and a content of text; with `answered` one at least is the assistant's.
    `TaskError` for anything else."""
    where = f"{sheet.where(row)}: {field!r}"
    if not isinstance(value, list) or not value:
        raise TaskError(f"{where} is no list of messages")
    for message in value:
        named = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not named or not isinstance(message.get("content"), str):
            raise TaskError(f'{where} holds no message {{"role": …, "content": text}}: {message!r:.80}')
    if answered and not any(message["role"] == "assistant" for message in value):
        raise TaskError(f"{where} has no message of the assistant, so there is nothing to learn")
    return value
