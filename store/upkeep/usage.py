"""What may be thrown away (`garbage`, for `gc`), what takes how much room (`usage`, for `du`), and removing a space."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.store import weights
from pipeline.store.errors import StoreError
from pipeline.store.files.local import Files, explain
from pipeline.store.format.names import (
    QUARANTINE,
    is_key,
    is_segment,
    is_temporary,
    segment_path,
    space_path,
    stream_of,
)
from pipeline.store.segments.segment import Segment
from pipeline.store.segments.unsealed import abandoned, disown, sign
from pipeline.store.space import REMOVING, Space
from pipeline.store.store import Store
from pipeline.store.tables.table import created_of, version_of
from pipeline.store.upkeep.transfer import INCOMING

DAY = 86400.0
WORK = "work"
WRITTEN_ANEW, REMOVED = "written anew", "of a feature space that was removed"


@dataclass(frozen=True)
class Garbage:
    """One thing that `gc` removes: its `path` in the store, `bytes`, and `why`."""

    path: str
    bytes: int
    why: str


@dataclass
class Found:
    """What `gc` found: `garbage` to be removed, and in `kept`, one line each, what it must not remove."""

    garbage: list[Garbage] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def garbage(store: Store, older_than: float = DAY) -> Found:
    """What no reader needs. Only what is surely dead, or older than `older_than` seconds. Removes nothing.

    A segment that was written anew is garbage only if every sample and state of it is read back, sound, from others.
    """
    files, found = store.files, Found()
    found.garbage += [Garbage(name, size_of(files, name), "unfinished file") for name in _strays(files, "", older_than)]
    spaces = store.spaces()
    for space in spaces:
        found.garbage += _of_space(space, older_than, found.kept)
    used = {str(space.identity.get("weights")) for space in spaces}

    def check(path: str, why: str, old: bool | None = None) -> None:
        if _old(files, path, older_than) if old is None else old:
            found.garbage.append(Garbage(path, size_of(files, path), why))

    for name in files.names("spaces"):
        note = f"{space_path(name)}/{REMOVING}"
        if is_key(name) and files.size(note) is not None:
            check(space_path(name), REMOVED, abandoned(files, note) or _old(files, note, older_than))
    for name in files.names(QUARANTINE):
        check(f"{QUARANTINE}/{name}", "put aside as damaged")
    for name in files.names("weights"):
        if name not in used:
            check(f"weights/{name}", "weights of no feature space")
            continue
        over = all(abandoned(files, n) or _old(files, n, older_than) for n in weights.notes(files, name))
        for file in weights.unfinished(files, name) if over else ():
            check(file, "writer is dead", True)
        for file in _strays(files, f"weights/{name}", older_than):
            check(file, "unfinished file", True)
    return found


def collect(store: Store, found: Found) -> None:
    """Remove what `garbage` found. Raises StoreError where the store cannot be written."""
    try:
        for item in found.garbage:
            _remove(store.files, item)
    except OSError as error:
        raise explain(error, "removing from", store.where) from error


def _remove(files: Files, item: Garbage) -> None:
    path = item.path
    if _is_file(files, path):
        files.remove(path)
    elif item.why == REMOVED:
        files.remove_tree(path, last=REMOVING)
    elif path.startswith("weights/") and is_key(path.removeprefix("weights/")):
        # With a note in it, what a kill leaves of it is an unfinished folder, not one that has lost its manifest.
        note = weights.leave_note(files, path.removeprefix("weights/"))
        files.remove(f"{path}/manifest.json")
        files.remove_tree(path, last=note.rsplit("/", 1)[-1])
    else:
        # The seal goes first, so that a segment that loses its files does not look sealed.
        if is_segment(path.rsplit("/", 1)[-1]):
            disown(files, path)
        files.remove(f"{path}/manifest.json")
        files.remove_tree(path, last="writer.json")
    if item.why == WRITTEN_ANEW:
        space, segment = path.split("/")[1::2]
        files.remove(f"{space_path(space)}/superseded/{segment}")


class _Sound:
    """Whether what a segment holds is there in the segments that readers see; each of these is read once."""

    def __init__(self, space: Space) -> None:
        self.index = space.index()
        self._known: dict[str, bool] = {}

    def covers(self, segment: Segment) -> bool:
        """Whether every sample of `segment` with all its states and columns stands, sound, where readers find it."""
        names = [*segment.states, *segment.columns]
        number, _ = self.index.locate(segment.keys, names)
        held = [self.index.bundles[f] for f in np.unique(number)] if (number >= 0).all() else []
        if not held and len(segment):
            return False
        return all(
            not bundle.missing(names) and all(self._sound(s) for s in (bundle.base, *map(bundle.holder.get, names)))
            for bundle in held
        )

    def _sound(self, segment: Segment | None) -> bool:
        if segment is None:
            return False
        if segment.id not in self._known:
            self._known[segment.id] = not segment.verify(deep=True)
        return self._known[segment.id]


def _of_space(space: Space, older_than: float, kept: list[str]) -> Iterator[Garbage]:
    files, home = space.files, space_path(space.id)
    segments = space.segments()
    live = {s.id: s for s in segments}
    superseded = set(space.superseded())
    sound = _Sound(space)
    for name in files.names(f"{home}/segments"):
        folder = segment_path(space.id, name)
        size = 0
        why = ""
        if name.startswith(INCOMING):
            dead = abandoned(files, f"{folder}/writer.json")
            why = "unfinished transfer" if dead or _old(files, folder, older_than) else ""
        elif is_segment(name) and files.size(f"{folder}/manifest.json") is None:
            dead = abandoned(files, f"{folder}/writer.json")
            why = "writer is dead" if dead else "unsealed" if _old(files, folder, older_than) else ""
        elif name in superseded and name not in live:
            why = WRITTEN_ANEW if _old(files, f"{home}/superseded/{name}", older_than) else ""
            if why and not sound.covers(Segment(files, space.id, name)):
                kept.append(f"{files.where(folder)} was written anew, but not all of it is found sound elsewhere")
                why = ""
        elif name in live:
            base = live[name].base
            if base is not None and base not in live and _old(files, folder, older_than):
                why = "supplement of a segment that is gone"
        if why:
            size = size_of(files, folder)
            yield Garbage(folder, size, why)
    for name in superseded - set(files.names(f"{home}/segments")):
        yield Garbage(f"{home}/superseded/{name}", 0, "note on a segment that is gone")
    for path in _older_tables(space):
        if _old(files, path, older_than):
            yield Garbage(path, size_of(files, path), "an older table of the same rows")
    for name in files.names(f"{home}/{WORK}"):
        if _old(files, f"{home}/{WORK}/{name}", older_than):
            yield Garbage(f"{home}/{WORK}/{name}", size_of(files, f"{home}/{WORK}/{name}"), "left by a cluster's work")
    tasks = [f"{home}/tasks/{task}" for task in files.names(f"{home}/tasks")]
    sealed = [segment_path(space.id, name) for name in live.keys() | superseded] if files.local else []
    for folder in (home, f"{home}/superseded", *tasks, *sealed):
        for name in _strays(files, folder, older_than):
            yield Garbage(name, size_of(files, name), "unfinished file")


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
    names = [f"{folder}/{n}".lstrip("/") for n in files.names(folder) if is_temporary(n)]
    return [name for name in names if _old(files, name, min(older_than, 3600.0))]


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
            for name, (size, _) in segment.contents.items():
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
    """Remove a feature space with all its states; returns the bytes. From the first step on no reader sees the space;
    what a kill leaves is unseen too, and `finish_removals`, `gc` or the next extraction of it removes the rest.

    Raises StoreError where the store cannot be written.
    """
    size, last = sum(s.nbytes for s in space.segments()), REMOVING
    try:
        try:
            sign(store.files, f"{space_path(space.id)}/{REMOVING}")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            last = "space.json"  # A full disk must not keep anyone from making room.
        store.files.remove_tree(space_path(space.id), last=last)
    except OSError as error:
        raise explain(error, "removing a feature space from", store.where) from error
    return size


def finish_removals(store: Store, start: str) -> list[str]:
    """Remove what is left of feature spaces whose removal was interrupted and whose id begins with `start`; their ids.

    Raises StoreError where the store cannot be written.
    """
    files, done = store.files, []
    try:
        for name in files.names("spaces"):
            if is_key(name) and name.startswith(start) and files.size(f"{space_path(name)}/{REMOVING}") is not None:
                files.remove_tree(space_path(name), last=REMOVING)
                done.append(name)
    except OSError as error:
        raise explain(error, "removing a feature space from", store.where) from error
    return done
