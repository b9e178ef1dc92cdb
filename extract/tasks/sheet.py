"""Reads a table (CSV, TSV, JSON lines, Parquet, CoNLL) whole; names file and line for all that is wrong with it.

TSV is read as GLUE writes it: no quoting, a quote is a character like any other. CSV follows RFC 4180; where the header
has no comma but a semicolon or a tab, that is the separator. A byte-order mark is dropped. Blank lines are skipped.

CoNLL files have a word a line, its columns parted by tabs or blanks, and a blank line after each sentence: a row is a
sentence, its columns are called 1, 2, … and a value is the list of the words' entries. Lines that begin with -DOCSTART-
and, before a sentence, `# name = value` are no words.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.extract.tasks.base import TaskError
from pipeline.extract.tasks.files import decoded, file_bytes
from pipeline.extract.tasks.pair_files import public_rows
from pipeline.store.format.digest import digest_bytes
from pipeline.store.near import near

WORDS = (".conll", ".iob", ".bio")
PARQUET = ".parquet"
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", PARQUET, *WORDS)
_HALF_A_PAIR = re.compile("[\ud800-\udfff]")
LONGEST_FIELD = 16 << 20  # characters; Python's own limit of 131,072 is less than a long document


@dataclass
class Sheet:
    """`rows[i][j]` is the value of `columns[j]`: text, or any JSON value, None where a JSON object lacks the key.

    `lines[i]` is the 1-based line row i ends on. `digest` is the xxh3-128 of the file's bytes. `dropped` counts rows
    left out because they were broken (only where that was allowed).
    """

    path: Path
    columns: list[str]
    rows: list[list[Any]]
    lines: list[int]
    digest: str
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, row: int) -> str:
        """`file, row N (line M)`, 1-based, for messages."""
        return f"{self.path}, row {row + 1} (line {self.lines[row]})"

    def column(self, name: str) -> list[Any]:
        """All values of a column. `TaskError` where there is none of that name, or more than one."""
        if name not in self.columns:
            hint = near(name, self.columns)
            raise TaskError(f"{self.path}: no column {name!r}; columns there: {', '.join(self.columns)}{hint}")
        if self.columns.count(name) > 1:
            raise TaskError(f"{self.path}: {self.columns.count(name)} columns are named {name!r}; rename all but one")
        place = self.columns.index(name)
        return [row[place] for row in self.rows]


def read_sheet(path: Path, columns: list[str] | None = None, drop_broken: bool = False) -> Sheet:
    """Reads `path` by its suffix. `columns`: names for a file without a header line. `drop_broken`: leave out rows with
    a wrong number of fields and count them.

    Raises `TaskError` for: no such file, empty file, no rows, not UTF-8, wrong number of fields, broken JSON or quotes,
    a file of another kind, `columns` for a file whose columns have names, or of which two are alike.
    """
    raw = file_bytes(path)
    digest = digest_bytes(raw)
    if columns is not None:
        _refuse_names(path, columns)
    if path.suffix.lower() == PARQUET:
        names, rows = _parquet_rows(path, raw)
        return Sheet(path, names, rows, list(range(1, len(rows) + 1)), digest)
    text = decoded(path, raw)
    if not text.strip():
        raise TaskError(f"{path} is empty; a table needs a header line and rows")
    if path.suffix.lower() in (".jsonl", ".json"):
        names, rows, lines = _json_rows(path, text)
        dropped = 0
    elif path.suffix.lower() in WORDS:
        names, rows, lines = _sentences(path, text)
        dropped = 0
    else:
        names, rows, lines, dropped = _delimited_rows(path, text, columns, drop_broken)
    if not rows:
        raise TaskError(f"{path} has a header but no rows")
    return Sheet(path, names, rows, lines, digest, dropped)


def _refuse_names(path: Path, columns: list[str]) -> None:
    if path.suffix.lower() not in (".csv", ".tsv"):
        raise TaskError(f"{path}: --columns is for CSV and TSV files without a header; the columns here have names")
    if twice := next((name for name in columns if columns.count(name) > 1), None):
        raise TaskError(f"--columns: {twice!r} is given twice")


def _parquet_rows(path: Path, raw: bytes) -> tuple[list[str], list[list[Any]]]:
    """Column names and rows of a Parquet file; NaN, which pandas writes for what is missing, is None. Numbers that are
    names of classes, as `datasets` writes them, are these names."""
    import pyarrow as pa
    from pyarrow import parquet

    if not raw:
        raise TaskError(f"{path} is empty; a table needs rows")
    try:
        table = parquet.ParquetFile(pa.BufferReader(raw)).read(use_threads=False)  # see store.tables.parquet
    except (pa.ArrowException, OSError) as error:
        what = " ".join(str(error).split())[:200]
        raise TaskError(f"{path} cannot be read as Parquet: {what}") from None
    names = [str(name) for name in table.column_names if not re.fullmatch(r"__index_level_\d+__", str(name))]
    if not names or not table.num_rows:
        raise TaskError(f"{path} has no {'rows' if names else 'columns'}")
    known = _class_names(table.schema)
    columns = []
    for place, name in enumerate(table.column_names):
        if name in names:
            values = table.column(place).to_pylist()
            values = [None if isinstance(v, float) and v != v else v for v in values]
            columns.append([named_class(path, known[name], v) for v in values] if name in known else values)
    return names, [list(row) for row in zip(*columns, strict=True)]


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Column → names of its classes, as `datasets` writes them into a file's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            n: list(f["names"]) for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def named_class(path: Path, names: list[str], value: Any) -> Any:
    """The class that a number stands for; None for -1, which is none. TaskError for a number that is no class."""
    if value is None or value == -1:
        return None
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise TaskError(f"{path}: {value!r} is none of the {len(names)} classes that the file names")
    return names[value]


def sheet_digest(path: Path) -> str:
    """`Sheet.digest` of the file at `path`, without understanding it. `TaskError` where it cannot be read."""
    return digest_bytes(file_bytes(path))


def _delimited_rows(
    path: Path, text: str, columns: list[str] | None, drop_broken: bool
) -> tuple[list[str], list[list[Any]], list[int], int]:
    records = _tsv_records(text) if path.suffix.lower() == ".tsv" else _csv_records(path, text, columns)
    names = columns
    rows: list[list[Any]] = []
    lines: list[int] = []
    dropped = 0
    for line, record in records:
        if names is None:
            names = [name.strip() for name in record]
        elif not rows and columns and _plain_names(record) == _plain_names(columns):
            raise TaskError(f"{path}: its first line has the names of the columns: leave --columns out")
        elif len(record) == len(names):
            rows.append(record)
            lines.append(line)
        elif drop_broken:
            dropped += 1
        else:
            raise TaskError(
                f"{path}, line {line}: {len(record)} fields where {len(names)} are expected ({', '.join(names)})"
            )
    return names or [], rows, lines, dropped


def _plain_names(names: Sequence[str]) -> list[str]:
    """Equal for the same names in any order and case."""
    return sorted(name.strip().casefold() for name in names)


def _tsv_records(text: str) -> Iterator[tuple[int, list[str]]]:
    # split at newlines only: str.splitlines would also cut at U+0085 and U+2028 inside a sentence
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line:
            yield number, line.split("\t")


def _csv_records(path: Path, text: str, columns: list[str] | None) -> Iterator[tuple[int, list[str]]]:
    header = text.split("\n", 1)[0]
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_FIELD))
    fitting = [s for s in ",;\t" if s in header]
    if columns and len(fitting) > 1:  # a row's texts may have any of them
        fitting = [s for s in fitting if len(next(csv.reader([header], delimiter=s))) == len(columns)]
    separator = next(iter(fitting), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for record in reader:
            if record:
                yield reader.line_num, record
    except csv.Error as error:
        raise TaskError(f"{path}, line {reader.line_num}: {error}; check the quotes") from None


def _sentences(path: Path, text: str) -> tuple[list[str], list[list[Any]], list[int]]:
    rows: list[list[Any]] = []
    lines: list[int] = []
    words: list[list[str]] = []
    wide = 0
    for number, line in enumerate([*text.split("\n"), ""], 1):
        line = line.rstrip("\r")
        if "\r" in line:
            raise TaskError(f"{path}, line {number}: lines end in a carriage return alone; save the file with newlines")
        if not line.strip() or line.startswith("-DOCSTART-"):
            if words:
                rows.append([list(column) for column in zip(*words, strict=True)])
                lines.append(number - 1)
                words = []
            continue
        if not words and re.match("# .* = ", line):
            continue
        cells = line.split("\t") if "\t" in line else line.split()
        wide = wide or len(cells)
        if len(cells) != wide or "" in cells:
            raise TaskError(f"{path}, line {number}: {len(cells)} columns where the first word has {wide}")
        words.append(cells)
    return [str(i + 1) for i in range(wide)], rows, lines


def _json_rows(path: Path, text: str) -> tuple[list[str], list[list[Any]], list[int]]:
    objects: list[tuple[int, Any]] = []
    if path.suffix.lower() == ".json" and (pairs := public_rows(path, text)) is not None:
        objects = list(enumerate(pairs, 1))
    elif path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{path} is not valid JSON: {error}") from None
        objects = list(enumerate(whole, 1))
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                objects.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise TaskError(f"{path}, line {number}: not valid JSON: {error}") from None
    for number, item in objects:
        if not isinstance(item, dict):
            raise TaskError(f"{path}, line {number}: a JSON object is expected, not {type(item).__name__}")
        for key, value in item.items():
            parts = value if isinstance(value, list) else [value]
            if not _is_text(key) or any(isinstance(part, str) and not _is_text(part) for part in parts):
                raise TaskError(
                    f"{path}, line {number}: half a surrogate pair in {ascii(key)[:80]}, which is no character; "
                    "write the text as UTF-8"
                )
    names = list(dict.fromkeys(key for _, item in objects for key in item))
    return names, [[item.get(name) for name in names] for _, item in objects], [number for number, _ in objects]


def _is_text(value: str) -> bool:
    """False where JSON's \\uXXXX made half a surrogate pair, which no tokenizer and no file can take."""
    return value.isascii() or _HALF_A_PAIR.search(value) is None
