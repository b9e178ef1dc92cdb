"""Who is at work in a folder, and removing what killed writers left: segments without a manifest."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress

from pipeline.store.errors import StoreError
from pipeline.store.files.local import Files
from pipeline.store.format.document import dump_document, load_document
from pipeline.store.format.names import MAX_SMALL_JSON, segment_path
from pipeline.store.segments.alive import describe_writer, is_dead

# A folder with nothing in it but temporary files is what a writer leaves that was killed before it said who it is.
_EMPTY_SECONDS = 3600.0


def sign(files: Files, name: str) -> None:
    """Write the note `name`: this process is at work in its folder."""
    files.publish(name, dump_document({"kind": "activation-writer", **describe_writer()}))


def abandoned(files: Files, name: str) -> bool:
    """Whether the process that wrote the note `name` is surely dead; False where there is no such note."""
    try:
        return is_dead(load_document(files.read(name, MAX_SMALL_JSON), files.where(name), "activation-writer"))
    except (FileNotFoundError, StoreError):
        return False


def sweep(files: Files, space: str, segments: Iterable[str], older_than: float | None = None) -> int:
    """Remove unsealed segments whose writer is dead; returns how many. See `Space.sweep`."""
    removed = 0
    for segment in segments:
        folder = segment_path(space, segment)
        # The writer is judged before the seal is looked for: a dead one can no longer seal in between.
        if _is_garbage(files, folder, older_than) and files.size(f"{folder}/manifest.json") is None:
            files.remove_tree(folder, last="writer.json")
            removed += 1
    return removed


def lost_manifest(files: Files, folder: str) -> bool:
    """Whether the segment's folder holds files, but neither a manifest nor the `writer.json` of somebody at work.

    No writer of ours leaves it so, however it ends: a manifest was deleted, or a copy by other means is not complete.
    """
    names = set(files.names(folder))
    if names & {"manifest.json", "writer.json"} or not any(name[0] != "." for name in names):
        return False
    # What is on its way out may have empty folders left.
    if files.searchable and not any(name.rsplit("/", 1)[-1][0] != "." for name in files.walk(folder)):
        return False
    # It may have been sealed while we looked.
    return all(files.size(f"{folder}/{name}") is None for name in ("manifest.json", "writer.json"))


def disown(files: Files, folder: str) -> None:
    """Take the seal off a segment that is to be removed, so that a kill leaves what the next sweep takes for a dead
    writer's."""
    with suppress(OSError, StoreError):  # A full disk must not keep anyone from making room.
        sign(files, f"{folder}/writer.json")
    files.remove(f"{folder}/manifest.json")


def _is_garbage(files: Files, folder: str, older_than: float | None) -> bool:
    names = files.names(folder)
    if "manifest.json" in names:
        return False
    try:
        touched = max(files.modified(f"{folder}/{name}".rstrip("/")) for name in ("", *names))
        age = time.time() - touched
        if older_than is not None and age > older_than:
            return True
        if all(name.startswith(".") for name in names):
            return age > _EMPTY_SECONDS
        return abandoned(files, f"{folder}/writer.json")
    except (FileNotFoundError, StoreError):
        return False  # Another sweep is at it, or it is not ours to judge.
