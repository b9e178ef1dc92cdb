"""What may be thrown away (`litter`, for `gc`), what takes how much room (`usage`, for `du`), and removing a space."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from store.alive import is_dead
from store.document import load_document
from store.errors import StoreError
from store.files import Files
from store.names import MAX_SMALL_JSON, QUARANTINE, is_segment, segment_path, space_path, stream_of
from store.space import Space
from store.store import Store
from store.sweep import disown
from store.tables import created_of, version_of
from store.transfer import INCOMING, abandoned

DAY = 86400.0
WORK = "work"


@dataclass(frozen=True)
class Litter:
    """One thing that `gc` removes: its `path` in the store, `bytes`, and `why`."""

    path: str
    bytes: int
    why: str


def litter(store: Store, older_than: float = DAY) -> list[Litter]:
    """What no reader needs. Only what is surely dead, or older than `older_than` seconds. Removes nothing."""
    files = store.files
    found = [Litter(name, size_of(files, name), "unfinished file") for name in _strays(files, "", older_than)]
    spaces = store.spaces()
    for space in spaces:
        found += _of_space(space, older_than)
    for name in files.names(QUARANTINE):
        if _old(files, f"{QUARANTINE}/{name}", older_than):
            found.append(Litter(f"{QUARANTINE}/{name}", size_of(files, f"{QUARANTINE}/{name}"), "put aside as damaged"))
    used = {str(space.identity.get("weights")) for space in spaces}
    for name in files.names("weights"):
        if name not in used and _old(files, f"weights/{name}", older_than):
            found.append(Litter(f"weights/{name}", size_of(files, f"weights/{name}"), "weights of no feature space"))
    return found


def collect(store: Store, found: list[Litter]) -> None:
    """Remove what `litter` found."""
    for item in found:
        if _is_file(store.files, item.path):
            store.files.remove(item.path)
        else:
            # The seal goes first, so that a segment that loses its files does not look sealed.
            if is_segment(item.path.rsplit("/", 1)[-1]):
                disown(store.files, item.path)
            store.files.remove(f"{item.path}/manifest.json")
            store.files.remove_tree(item.path, last="writer.json")
        if item.why == "written anew":
            space, segment = item.path.split("/")[1::2]
            store.files.remove(f"{space_path(space)}/superseded/{segment}")


def _of_space(space: Space, older_than: float) -> Iterator[Litter]:
    files, home = space.files, space_path(space.id)
    segments = space.segments()
    live = {s.id for s in segments}
    superseded = set(space.superseded())
    for name in files.names(f"{home}/segments"):
        folder = segment_path(space.id, name)
        size = 0
        why = ""
        if name.startswith(INCOMING):
            why = "unfinished transfer" if abandoned(files, folder) or _old(files, folder, older_than) else ""
        elif is_segment(name) and files.size(f"{folder}/manifest.json") is None:
            why = "writer is dead" if _dead(files, folder) else "unsealed" if _old(files, folder, older_than) else ""
        elif name in superseded and name not in live:
            why = "written anew" if _old(files, f"{home}/superseded/{name}", older_than) else ""
        elif name in live:
            base = next(s.base for s in segments if s.id == name)
            if base is not None and base not in live and _old(files, folder, older_than):
                why = "supplement of a segment that is gone"
        if why:
            size = size_of(files, folder)
            yield Litter(folder, size, why)
    for name in superseded - set(files.names(f"{home}/segments")):
        yield Litter(f"{home}/superseded/{name}", 0, "note on a segment that is gone")
    for path in _older_tables(space):
        if _old(files, path, older_than):
            yield Litter(path, size_of(files, path), "an older table of the same rows")
    for name in files.names(f"{home}/{WORK}"):
        if _old(files, f"{home}/{WORK}/{name}", older_than):
            yield Litter(f"{home}/{WORK}/{name}", size_of(files, f"{home}/{WORK}/{name}"), "left by a cluster's work")
    for folder in (home, *(f"{home}/tasks/{task}" for task in files.names(f"{home}/tasks"))):
        for name in _strays(files, folder, older_than):
            yield Litter(name, size_of(files, name), "unfinished file")


def _older_tables(space: Space) -> Iterator[str]:
    """Tables that were written anew: of the same split, number of rows, version and origin, and not the last."""
    same: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for info in space.tables():
        try:
            header = space.read_header(info)
        except StoreError:
            continue
        name = (info.task, info.split, str(info.rows), version_of(header), str(header.get("origin")))
        same.setdefault(name, []).append((created_of(header), info.path))
    for found in same.values():
        yield from (path for created, path in sorted(found)[:-1] if created)


def _strays(files: Files, folder: str, older_than: float) -> list[str]:
    names = [f"{folder}/{n}".lstrip("/") for n in files.names(folder) if n.startswith(".") and n.endswith(".tmp")]
    return [name for name in names if _old(files, name, min(older_than, 3600.0))]


def _dead(files: Files, folder: str) -> bool:
    try:
        data = files.read(f"{folder}/writer.json", MAX_SMALL_JSON)
        return is_dead(load_document(data, folder, "activation-writer"))
    except (FileNotFoundError, StoreError):
        return False


def _old(files: Files, name: str, older_than: float) -> bool:
    try:
        return time.time() - files.modified(name) >= older_than
    except (OSError, StoreError):
        return False


def _is_file(files: Files, name: str) -> bool:
    return files.path(name).is_file() if files.local else files.size(name) is not None


def size_of(files: Files, name: str) -> int:
    """Bytes of a file, or of all files below a folder."""
    if _is_file(files, name):
        return files.size(name) or 0
    try:
        return sum(s or 0 for s in files.sizes(name, files.walk(name)).values())
    except (StoreError, OSError):
        return 0


def usage(store: Store) -> dict[str, Any]:
    """Bytes by space and state, of tables, weights, quarantine and what is unsealed."""
    files = store.files
    spaces = []
    for space in store.spaces():
        states: dict[str, int] = {}
        segments = space.segments()
        for segment in segments:
            for name, (size, _) in segment.manifest.files.items():
                array = name.split("/", 1)[0].removesuffix(".scale")
                if array not in segment.states:
                    array = "other"
                states[array] = states.get(array, 0) + size
        whole = sum(s.nbytes for s in segments)
        rest = size_of(files, f"{space_path(space.id)}/segments") - whole if files.searchable else 0
        tables = sum(files.size(t.path) or 0 for t in space.tables())
        order = dict(sorted(states.items(), key=lambda kv: (stream_of(kv[0]), -kv[1])))
        spaces.append({"space": space.id, "bytes": whole, "states": order, "tables": tables, "other": max(0, rest)})
    out: dict[str, Any] = {"store": store.where, "spaces": spaces}
    for name in ("weights", QUARANTINE):
        out[name] = size_of(files, name) if files.searchable else 0
    return out


def remove_space(store: Store, space: Space) -> int:
    """Remove a feature space with all its states; returns the bytes. What a kill leaves, a second call removes."""
    segments = space.segments()
    for segment in segments:
        disown(store.files, segment.folder)
    store.files.remove_tree(space_path(space.id), last="space.json")
    return sum(s.nbytes for s in segments)
