"""Which of a store's task tables a run reads: all of one version of the task, never a mix.

A table of a user's own is known by its file's name, and the file changes: rows are added, labels corrected, another
column becomes the label. The store keeps every table. Splits of different versions must not meet, because what one
holds out the other may train on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extract.tasks import canonical_name
from extract.tasks.sheet import SUFFIXES, sheet_digest
from pipeline.recipe import Recipe
from pipeline.stored import check_table
from store import Space, TaskTable, digest_json
from store.errors import StoreError
from store.tables import TableInfo


def version_of(header: Mapping[str, Any]) -> str:
    """Digest of what the rows of a table were made of: its dataset and how labels and texts were read from it."""
    return digest_json([header.get("spec"), header.get("provenance")])


class _Tables:
    """The stored tables of one task, each read once, the last written first."""

    def __init__(self, space: Space, task: str) -> None:
        self.space = space
        self.infos = sorted((t for t in space.tables() if t.task == task), key=lambda t: t.modified, reverse=True)
        self._read: dict[str, TaskTable] = {}

    def read(self, info: TableInfo) -> TaskTable:
        if info.path not in self._read:
            found = self.space.read_table(info)
            self._read[info.path] = check_table(found, self.space.files.where(info.path))
        return self._read[info.path]

    def of(self, version: str) -> dict[str, TaskTable]:
        """The largest table of each split in `version`, of equals the last written."""
        out: dict[str, TaskTable] = {}
        for info in sorted(self.infos, key=lambda t: -t.rows):
            if info.split not in out and version_of((table := self.read(info)).header) == version:
                out[info.split] = table
        return dict(sorted(out.items()))


def stored_tables(space: Space, recipe: Recipe, version: str | None = None) -> dict[str, TaskTable]:
    """The tables of the recipe's task by split: of `version`, else of the version written last that is what the recipe
    says of columns and files. Raises StoreError saying what differs where there is none."""
    task = canonical_name(recipe.task)
    tables, refused = _Tables(space, task), ""
    digests = _digests(recipe) if version is None else {}
    seen: set[str] = set()
    for info in tables.infos:
        header = tables.read(info).header
        found = version_of(header)
        if found in seen:
            continue
        seen.add(found)
        differs = (found != version) if version else unlike(recipe, header, digests)
        if not differs:
            return tables.of(found)
        refused = refused or str(differs)
    if version:
        raise StoreError(f"the store no longer has the rows of task {task!r} as they were then")
    raise StoreError(f"task {task!r} is in the store, but not as asked for: {refused}")


def unlike(recipe: Recipe, header: Mapping[str, Any], digests: Mapping[str, tuple[str, str]]) -> str:
    """In what a stored table is not what `recipe` says, "" where it is. What is left out fits anything, and so does a
    table without the fact. `digests`: split → (file, its digest) of the files at hand."""
    spec, origin = header.get("spec", {}), header.get("provenance", {})
    fields = [*spec.get("fields", ()), "", ""]
    for option, asked, there in (
        ("--text", recipe.text, fields[0]),
        ("--text-pair", recipe.text_pair, fields[1]),
        ("--label", recipe.label, origin.get("label")),
        ("--kind", recipe.kind, spec.get("kind")),
    ):
        if asked is not None and there is not None and asked != there:
            return f"{option} was {there!r}, now {asked!r}"
    files = origin.get("files")
    for split, (path, digest) in digests.items() if isinstance(files, dict) else ():
        if files.get(split) != digest:
            return f"{path} is not the file that was extracted on {str(header.get('created'))[:10]}, or has changed"
    return ""


def _digests(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """The files of a table of the user's own that are at hand. A teammate trains without any of them."""
    if Path(recipe.task).suffix.lower() not in SUFFIXES:
        return {}
    path = Path(recipe.task)
    if recipe.data and not path.exists():
        path = Path(recipe.data) / path
    given = {"train": path, "validation": recipe.validation, "test": recipe.test}
    return {s: (str(p), sheet_digest(Path(p))) for s, p in given.items() if p and Path(p).is_file()}


def save_tables(space: Space, made: Mapping[str, TaskTable]) -> None:
    """Store the tables of an extraction. What is there already and of the version written last is left alone, so that
    an extraction with nothing to do writes nothing."""
    first = next(iter(made.values()))
    tables = _Tables(space, first.task)
    last = version_of(tables.read(tables.infos[0]).header) if tables.infos else ""
    for split, table in made.items():
        same = [t for t in tables.infos if t.split == split and t.rows == len(table)] if last else []
        if last != version_of(table.header) or not any(_equal(tables.read(t), table) for t in same):
            space.save_table(table)


def _equal(one: TaskTable, other: TaskTable) -> bool:
    """Whether two tables say the same; when they were written does not matter, and a stored header has no `rows`."""
    heads = [{k: v for k, v in t.header.items() if k not in ("created", "rows")} for t in (one, other)]
    return digest_json(heads[0]) == digest_json(heads[1]) and (
        (one.keys, one.labels, one.texts) == (other.keys, other.labels, other.texts)
    )
