"""Pairs as a task: a table in which what several slots read of a row belongs together, such as an image and its
caption.

A row has no label; each slot reads a column of its own. An image with five captions stands in five rows, which are
always of one split: rows are held out image by image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.extract.tasks.base import Rows, Task, TaskError, TaskSpec
from pipeline.extract.tasks.names import table_name
from pipeline.extract.tasks.sheet import Sheet
from pipeline.extract.tasks.splits import part

# What such columns are called, where nobody says it.
IMAGES = ("image", "images", "image_name", "file_name", "filename", "file", "video", "video_id")
CAPTIONS = ("caption", "captions", "sentence", "text", "raw", "comment")


@dataclass(frozen=True)
class Paired:
    """How one of several slots reads a table of pairs. `together`: the column whose values keep rows in one split, ""
    where nobody says it; `files`: its own column holds names of files."""

    together: str = ""
    files: bool = False


def load_pairs(
    path: Path,
    table: Sheet,
    column: str | None,
    how: Paired,
    validation: Path | None,
    test: Path | None,
    name: str | None,
    columns: Sequence[str] = (),
) -> Task:
    """The rows of `table`, read from `path`, as one slot of a task of pairs. `column`: the slot's own. `columns`: what
    those of all files are called, where these have no header. Raises `TaskError` naming the row in which something is missing, or the columns there are where none is called as it should
    be."""
    column = column or _called(table, IMAGES if how.files else CAPTIONS, "--image" if how.files else "--text")
    together = how.together or next((c for c in IMAGES if c in table.columns), column)

    def rows_of(sheet: Sheet, split: str) -> Rows:
        _texts(sheet, together)
        texts: list[tuple[str, ...]] = [(text,) for text in _texts(sheet, column)]
        ids = ["" if v is None else str(v) for v in sheet.column("id")] if "id" in sheet.columns else []
        return Rows(texts, [None] * len(texts), ids if column != "id" else [])

    parted = part(path, table, rows_of, validation, test, together=together, columns=columns)
    spec = TaskSpec(table_name(name or path.stem), "pair", (), (), (column,), "")
    return Task(spec, parted.splits, parted.provenance, parted.absent)


def _called(table: Sheet, names: Sequence[str], option: str) -> str:
    if found := next((n for n in names if n in table.columns), None):
        return found
    raise TaskError(f"{table.path}: name a column with {option}; columns there: {', '.join(table.columns)}")


def _texts(sheet: Sheet, column: str) -> list[str]:
    """A column as text. Raises TaskError for a value that is missing, blank, or no text."""

    def text(row: int, value: Any) -> str:
        found = str(value) if isinstance(value, str | int | float) else ""
        if not found.strip():
            what = (
                "is empty" if value in (None, "") or isinstance(value, str) else f"is {type(value).__name__}, not text"
            )
            raise TaskError(f"{sheet.where(row)}: {column!r} {what}; every row of pairs needs one")
        return found

    return [text(row, value) for row, value in enumerate(sheet.column(column))]
