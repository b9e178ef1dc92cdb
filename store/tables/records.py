"""Records of extractions: which tables one wrote, and which states it stored of their samples.

A table lies beside others of its task and a supplement beside its base, and when one is deleted nothing that is left is
damaged. So that `verify` misses it, an extraction leaves a small document beside its tables, and the tables name the
document. It is named by its content: the same extraction, here or elsewhere, leaves the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.store.errors import StoreError
from pipeline.store.files.local import Files, explain
from pipeline.store.format.digest import digest_json
from pipeline.store.format.document import dump_document, load_document
from pipeline.store.format.names import FORMAT, MAX_SMALL_JSON, check_task, is_key, is_state

KIND = "activation-extraction"
_PREFIX, _SUFFIX = "extracted-", ".json"


@dataclass(frozen=True)
class Record:
    """`rows`: split → rows of the tables of `task` that are of `version` (see `tables.table.version_of`). `states`:
    stored of every sample of these tables; () in the record that the tables name."""

    task: str
    version: str
    rows: Mapping[str, int]
    states: tuple[str, ...] = ()

    def members(self) -> dict[str, Any]:
        """As JSON."""
        return {"task": self.task, "version": self.version, "rows": dict(self.rows), "states": list(self.states)}

    @property
    def id(self) -> str:
        """What the record is called."""
        return digest_json(self.members())


def record_path(folder: str, task: str, record: str) -> str:
    """The file of a record; `folder` is that of a space's tables."""
    return f"{folder}/{check_task(task)}/{_PREFIX}{record}{_SUFFIX}"


def save_record(files: Files, folder: str, record: Record) -> None:
    """Store `record` where it is not there already. Raises StoreError if it cannot be written."""
    path = record_path(folder, record.task, record.id)
    if files.size(path) is not None:
        return
    try:
        files.make(path.rsplit("/", 1)[0])
        files.publish(path, dump_document({"kind": KIND, "format": FORMAT, **record.members()}))
    except OSError as error:
        raise explain(error, "writing a record to", files.root) from error


def list_records(files: Files, folder: str) -> list[str]:
    """The files of all records, by task."""
    found = []
    for task in files.names(folder):
        names = files.names(f"{folder}/{task}")
        ours = (n for n in names if n.startswith(_PREFIX) and n.endswith(_SUFFIX))
        found += [f"{folder}/{task}/{n}" for n in ours if is_key(n[len(_PREFIX) : -len(_SUFFIX)])]
    return found


def read_record(files: Files, path: str) -> Record:
    """A listed record. Raises StoreError if it is damaged or gone."""
    where = files.where(path)
    try:
        document = load_document(files.read(path, MAX_SMALL_JSON), where, KIND)
    except FileNotFoundError:
        raise StoreError(f"{where} is missing: extract again, which writes it anew") from None
    rows: Any = document.get("rows")
    states: Any = document.get("states")
    task, name = path.split("/")[-2:]
    sound = document.get("task") == task and is_key(document.get("version"))
    sound = sound and isinstance(rows, dict) and all(type(n) is int for n in rows.values())
    sound = sound and isinstance(states, list) and all(is_state(s) for s in states)
    record = Record(task, str(document.get("version")), rows, tuple(states)) if sound else None
    if record is None or name != f"{_PREFIX}{record.id}{_SUFFIX}":
        raise StoreError(f"{where} is malformed: delete it and extract again")
    return record
