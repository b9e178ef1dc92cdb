"""Pairs as a task: a table in which what several slots read of a row belongs together, such as an image and its
caption.

A row has no label; each slot reads a column of its own. An image with five captions stands in five rows, which are
always of one split: rows are held out image by image, unless a column `split` says which they are of. Public layouts:
`pair_files`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.extract.tasks.base import SPLIT_NAMES, SPLITS, Rows, Task, TaskError, TaskSpec
from pipeline.extract.tasks.files import field_text
from pipeline.extract.tasks.names import table_name
from pipeline.extract.tasks.pair_files import DESCRIPTIONS, MSRVTT, msvd_rows
from pipeline.extract.tasks.sheet import Sheet, read_sheet
from pipeline.extract.tasks.splits import Parted, part
from pipeline.store.format.digest import digest_json

# What such columns are called, where nobody says it.
IMAGES = ("image", "images", "image_name", "file_name", "filename", "file", "video", "video_id")
CAPTIONS = ("caption", "captions", "sentence", "text", "raw", "comment")
SAID = {**SPLIT_NAMES, "restval": "train"}  # in a column; COCO's rest of the validation images is trained on


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
    those of all files are called, where these have no header. Raises `TaskError` naming the row in which something is
    missing, or the columns there are where none is called as it should be."""
    if "split" in table.columns and (validation or test):
        raise TaskError(f"{path}: its column 'split' says what is held out; leave out --validation and --test")
    column = column or _called(table, IMAGES if how.files else CAPTIONS, "--image" if how.files else "--text")
    # Equal in all slots: where nobody says it, one slot's own column is among these.
    together = how.together or next((c for c in (*IMAGES, *CAPTIONS) if c in table.columns), column)

    def rows_of(sheet: Sheet, split: str) -> Rows:
        _texts(sheet, together)
        texts: list[tuple[str, ...]] = [(text,) for text in _texts(sheet, column)]
        ids = ["" if v is None else str(v) for v in sheet.column("id")] if "id" in sheet.columns else []
        return Rows(texts, [None] * len(texts), ids if column != "id" else [])

    if table.columns == MSRVTT and path.suffix == ".json":  # the videos of the files beside it are among its own
        held = {v for file in (validation, test) if file for v in read_sheet(file).column(together)}
        table = _without(table, together, held)
    if "split" in table.columns:
        parted = _said(table, rows_of, together)
    else:
        parted = part(path, table, rows_of, validation, test, together=together, columns=columns)
    spec = TaskSpec(table_name(name or path.stem), "pair", (), (), (column,), "")
    return Task(spec, parted.splits, parted.provenance, parted.absent)


def load_msvd(folder: Path, column: str | None, how: Paired, name: str | None) -> Task:
    """MSVD's files in `folder` as one slot of a task of pairs."""
    rows = msvd_rows(folder)
    columns = ["video", "caption", "split"]
    digest = digest_json([list(row.values()) for row in rows])
    lines = list(range(1, len(rows) + 1))
    table = Sheet(folder / DESCRIPTIONS, columns, [[row[c] for c in columns] for row in rows], lines, digest)
    return load_pairs(folder, table, column, how, None, None, name or folder.resolve().name)


def _without(table: Sheet, column: str, held: set[Any]) -> Sheet:
    """`table` without the rows whose `column` is among `held`. TaskError where nothing is left."""
    kept = [i for i, value in enumerate(table.column(column)) if value not in held]
    if not kept:
        raise TaskError(f"{table.path}: the held-out files name all of its {column}s")
    return replace(table, rows=[table.rows[i] for i in kept], lines=[table.lines[i] for i in kept])


def _said(table: Sheet, rows_of: Callable[[Sheet, str], Rows], together: str) -> Parted:
    """The splits that the column `split` says. TaskError naming a row that says another word, or what is left out."""
    places: dict[str, list[int]] = {}
    for row, value in enumerate(table.column("split")):
        if not isinstance(value, str) or value not in SAID:
            raise TaskError(f"{table.where(row)}: split {value!r} is none of {', '.join(SAID)}")
        places.setdefault(SAID[value], []).append(row)
    if "train" not in places:
        raise TaskError(f"{table.path}: no row is of split train")
    everything = rows_of(table, "train")
    splits = {s: everything.take(places[s]) for s in SPLITS if s in places}
    absent = {s: "no row says so in column 'split'" for s in SPLITS if s not in places}
    provenance = {
        "dataset": table.path.name, "revision": table.digest, "licence": "not stated", "source": "table",
        "splits": "column", "files": {"train": table.digest}, "together": together,
    }  # fmt: skip
    return Parted(everything, splits, absent, provenance)


def _called(table: Sheet, names: Sequence[str], option: str) -> str:
    if found := next((n for n in names if n in table.columns), None):
        return found
    raise TaskError(f"{table.path}: name a column with {option}; columns there: {', '.join(table.columns)}")


def _texts(sheet: Sheet, column: str) -> list[str]:
    """A column as text. Raises TaskError for a value that is missing, blank, or no text."""

    def text(row: int, value: Any) -> str:
        found = field_text(value)
        if not found.strip():
            what = (
                "is empty" if value in (None, "") or isinstance(value, str) else f"is {type(value).__name__}, not text"
            )
            raise TaskError(f"{sheet.where(row)}: {column!r} {what}; every row of pairs needs one")
        return found

    return [text(row, value) for row, value in enumerate(sheet.column(column))]
