"""Copying between stores: push, pull and merge are the same thing, a union in which only what is missing is copied.

Every file is checked against its digest when it is read and again when it has arrived. A segment becomes visible only
when all of it is there: on a disk it is gathered in a folder `.incoming-…` and renamed, in a bucket its manifest comes
last. A copy that was interrupted goes on with the files that are there, whoever began it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from store import weights
from store.alive import describe_writer, is_dead
from store.digest import digest_bytes
from store.document import dump_document, load_document
from store.errors import StoreError
from store.files import Files, explain
from store.names import MAX_JSON, MAX_SMALL_JSON, is_key, segment_path
from store.segment import Segment
from store.space import Space
from store.store import Store

INCOMING = ".incoming-"


@dataclass
class Copied:
    """What a transfer did. `skipped`: segments that were there; `problems`: what could not be copied, and why."""

    spaces: int = 0
    segments: int = 0
    skipped: int = 0
    tables: int = 0
    weights: int = 0
    bytes: int = 0
    resumed_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def transfer(
    source: Store,
    target: Store,
    spaces: list[str] | None = None,
    progress: Callable[[str, int], None] = lambda what, size: None,
) -> Copied:
    """Copy to `target` whatever `source` has and it has not; `spaces`: only these, by id.

    `progress(path, bytes)` is called for every file. A damaged segment is left out and named in `problems`. Raises
    StoreError when `target` cannot be written or what is written there does not arrive.
    """
    done = Copied()
    if source.where == target.where:
        raise StoreError(f"{source.where} and {target.where} are the same store")
    try:
        for space in source.spaces():
            if spaces is None or space.id in spaces:
                _copy_space(space, target, done, progress)
                _copy_weights(source.files, target.files, str(space.identity.get("weights", "")), done, progress)
    except OSError as error:
        raise explain(error, "copying to", target.where, free=target.files.free) from error
    return done


def _copy_space(space: Space, target: Store, done: Copied, progress: Callable[[str, int], None]) -> None:
    known = {s.id for s in target.spaces()}
    mine = target.create_space(space.identity)
    done.spaces += mine.id not in known
    # A note on a segment that is gone must not keep it from coming back with its supplements.
    hidden = {
        s for s in mine.superseded() if target.files.size(f"{segment_path(mine.id, s)}/manifest.json") is not None
    }
    there = {s.id for s in mine.segments()} | hidden
    for segment in space.segments():
        if segment.id in there:
            done.skipped += 1
            continue
        try:
            _copy_segment(segment, target.files, done, progress)
        except Damaged as error:
            done.problems.append(str(error))
    for table in space.tables():
        if target.files.size(table.path) is None:
            try:
                data = space.files.read(table.path, MAX_JSON * 16)
            except FileNotFoundError:
                continue
            if digest_bytes(data)[:16] != table.path.rsplit("-", 1)[1][:16]:
                done.problems.append(f"task table {space.files.where(table.path)} is damaged: left out")
                continue
            target.files.make(table.path.rsplit("/", 1)[0])
            target.files.publish(table.path, data)
            done.tables += 1
            done.bytes += len(data)
            progress(table.path, len(data))
    for record in space.records():
        mine.save_record(record)


class Damaged(StoreError):
    """A file of the source is not what its manifest says."""


def _copy_segment(segment: Segment, target: Files, done: Copied, progress: Callable[[str, int], None]) -> None:
    folder = _claim(target, segment) if target.local else segment.folder
    if not target.local:
        _sign(target, folder)
    there = target.sizes(folder, segment.manifest.files)
    made: set[str] = set()
    for name, (size, digest) in segment.manifest.files.items():
        if there[name] == size and _digest(target, f"{folder}/{name}", size) == digest:
            done.resumed_bytes += size
            progress(f"{segment.id}/{name}", size)
            continue
        data = _read(segment.files, f"{segment.folder}/{name}", size, digest)
        parent = f"{folder}/{name}".rsplit("/", 1)[0]
        if parent not in made:
            target.make(parent)
            made.add(parent)
        target.remove(f"{folder}/{name}")
        if target.write(f"{folder}/{name}", [data]) != (size, digest):
            raise StoreError(f"{target.where(f'{folder}/{name}')} was not written as it was read")
        done.bytes += size
        progress(f"{segment.id}/{name}", size)
    names = [f"{folder}/{name}" for name in segment.manifest.files]
    target.sync(names)
    target.sync(sorted({name.rsplit("/", 1)[0] for name in names}))
    if target.local:
        # As the disk gives them back; a bucket has said so for each object already.
        for name, (size, digest) in segment.manifest.files.items():
            if _digest(target, f"{folder}/{name}", size) != digest:
                raise StoreError(f"{target.where(f'{folder}/{name}')} is not what was written there: check the disk")
    target.publish(f"{folder}/manifest.json", segment.files.read(f"{segment.folder}/manifest.json", MAX_JSON))
    target.remove(f"{folder}/writer.json")
    if target.local:
        _place(target, folder, segment.folder)
    done.segments += 1


def _claim(target: Files, segment: Segment) -> str:
    """A folder of our own to gather `segment` in, with what a dead transfer of it has left."""
    parent = segment.folder.rsplit("/", 1)[0]
    prefix = f"{INCOMING}{segment.id}-"
    mine = f"{parent}/{prefix}{secrets.token_hex(4)}"
    for name in target.names(parent):
        if name.startswith(prefix) and abandoned(target, f"{parent}/{name}"):
            # A rename succeeds for one of those who try.
            with suppress(OSError):
                target.move(f"{parent}/{name}", mine)
                break
    target.make(mine)
    _sign(target, mine)
    return mine


def _sign(target: Files, folder: str) -> None:
    """Say who is at work in `folder`."""
    target.publish(f"{folder}/writer.json", dump_document({"kind": "activation-writer", **describe_writer()}))


def abandoned(files: Files, folder: str) -> bool:
    """Whether the process that gathers a segment in `folder` is dead."""
    try:
        data = files.read(f"{folder}/writer.json", MAX_SMALL_JSON)
        return is_dead(load_document(data, folder, "activation-writer"))
    except (FileNotFoundError, StoreError):
        return False


def _place(target: Files, folder: str, final: str) -> None:
    """Make the gathered segment visible; what stands in its place is an unsealed copy or the same segment."""
    for _ in range(2):
        try:
            target.move(folder, final)
            return
        except FileExistsError:
            if target.size(f"{final}/manifest.json") is not None:
                break
            target.remove_tree(final, last="writer.json")
    target.remove_tree(folder)


def _copy_weights(
    source: Files, target: Files, digest: str, done: Copied, progress: Callable[[str, int], None]
) -> None:
    try:
        there = weights.listed(target, digest) if is_key(digest) else None
        files = weights.stored_bytes(source, digest, there)
    except StoreError as error:
        done.problems.append(str(error))
        return
    if files:
        weights.add_bytes(target, digest, files)
        done.weights += len(files)
        for name, data in files.items():
            done.bytes += len(data)
            progress(f"weights/{digest}/{name}", len(data))


def _read(files: Files, name: str, size: int, digest: str) -> bytes:
    """The file, read twice if its first copy is not what it should be. Raises Damaged."""
    what = "differs from its digest"
    for _ in range(2):
        try:
            data = files.read(name, size)
        except FileNotFoundError:
            what = "is missing"
            break
        except StoreError as error:
            if "allowed" not in str(error):
                raise
            what = "is longer than its manifest says"
            break
        if digest_bytes(data) == digest:
            return data
        if not files.forget(name):
            break
    raise Damaged(f"{files.where(name)} {what}: its segment is left out; `pipeline store repair` there")


def _digest(files: Files, name: str, size: int) -> str:
    try:
        return digest_bytes(files.read(name, size))
    except (FileNotFoundError, StoreError):
        return ""
