"""Copying between stores: push, pull and merge are the same thing, a union in which only what is missing is copied.

Every file is checked against its digest when it is read and again when it has arrived. A segment becomes visible only
when all of it is there: on a disk it is gathered in a folder `.incoming-…` and renamed, in a bucket its manifest comes
last. A copy that was interrupted goes on with the files that are there, whoever began it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pipeline.store import weights
from pipeline.store.errors import StoreError
from pipeline.store.files.local import Files, explain
from pipeline.store.format.digest import digest_bytes
from pipeline.store.format.names import MAX_JSON, is_key, segment_path
from pipeline.store.segments.index import KeyIndex
from pipeline.store.segments.segment import Segment
from pipeline.store.segments.unsealed import abandoned, sign
from pipeline.store.space import Space
from pipeline.store.store import Store
from pipeline.store.tables.table import TableInfo, read_table

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
                # Weights first: who finds tables will want to train from them.
                _copy_weights(source.files, target.files, str(space.identity.get("weights", "")), done, progress)
                _copy_space(space, target, done, progress)
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
    # In this order: a table is written when the samples that it names are sealed.
    tables = space.tables()
    segments = space.segments()
    for segment in segments:
        if segment.id in there:
            done.skipped += 1
            continue
        try:
            _copy_segment(segment, target.files, done, progress)
        except Damaged as error:
            done.problems.append(str(error))
    for table in tables:
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
    done.problems += _unlisted(space, mine, tables, segments)


def _unlisted(space: Space, mine: Space, tables: list[TableInfo], listed: list[Segment]) -> list[str]:
    """What the tables and supplements of `space` name, and neither its own listing nor `mine` has: a folder that is
    listed in part only looks like a store with fewer segments."""
    held = [*listed, *mine.segments()]
    there = {segment.id for segment in held}
    known = KeyIndex(segment.keys for segment in held)
    splits = {(t.task, t.split, t.rows) for t in (*tables, *mine.tables())}
    where, found = space.files.where(""), []
    for segment in listed:
        if segment.base is not None and segment.base not in there:
            found.append(f"{where} lists segment {segment.id}, but not its base {segment.base}")
    for info in tables:
        files = mine.files if mine.files.local else space.files
        try:
            table = read_table(files, info)
        except StoreError:
            continue  # it is damaged, and was named as such
        beside = table.header.get("beside")
        for split, rows in beside.items() if isinstance(beside, dict) else ():
            if (info.task, split, rows) not in splits:
                found.append(f"{where} lists {info.path}, but not the table {split} of {rows} rows written with it")
        absent = int(np.count_nonzero(known.first(table.keys) < 0))
        if absent:
            found.append(f"{where} lists no segment with {absent:,} of the {len(table):,} samples of {info.path}")
    return [f"{what}: its listing may be cut short; copy again, or extract those there" for what in found]


class Damaged(StoreError):
    """A file of the source is not what its manifest says."""


def _copy_segment(segment: Segment, target: Files, done: Copied, progress: Callable[[str, int], None]) -> None:
    folder = _claim(target, segment) if target.local else segment.folder
    sign(target, f"{folder}/writer.json")
    there = target.sizes(folder, segment.contents)
    made: set[str] = set()
    for name, (size, digest) in segment.contents.items():
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
    names = [f"{folder}/{name}" for name in segment.contents]
    target.sync(names)
    target.sync(sorted({name.rsplit("/", 1)[0] for name in names}))
    # The very manifest that was checked when the segment was opened, not whatever stands there now.
    seal = _read(segment.files, f"{segment.folder}/manifest.json", *segment.seal)
    if target.local:
        # As the disk gives them back; a bucket has said so for each object already.
        target.publish(f"{folder}/manifest.json", seal)
        for name, (size, digest) in {**segment.contents, "manifest.json": segment.seal}.items():
            if _digest(target, f"{folder}/{name}", size) != digest:
                raise StoreError(f"{target.where(f'{folder}/{name}')} is not what was written there: check the disk")
        _place(target, folder, segment.folder)
    else:
        target.publish(f"{folder}/manifest.json", seal)
        target.remove(f"{folder}/writer.json")
    done.segments += 1


def _claim(target: Files, segment: Segment) -> str:
    """A folder of our own to gather `segment` in, with what a dead transfer of it has left."""
    parent = segment.folder.rsplit("/", 1)[0]
    prefix = f"{INCOMING}{segment.id}-"
    mine = f"{parent}/{prefix}{secrets.token_hex(4)}"
    for name in target.names(parent):
        if name.startswith(prefix) and abandoned(target, f"{parent}/{name}/writer.json"):
            # A rename succeeds for one of those who try.
            try:
                target.move(f"{parent}/{name}", mine)
            except OSError:
                continue
            # What it was about to rename when it died would be a stranger in the sealed segment.
            for file in target.walk(mine):
                if file not in segment.contents and file != "writer.json":
                    target.remove(f"{mine}/{file}")
            break
    target.make(mine)
    return mine


def _place(target: Files, folder: str, final: str) -> None:
    """Make the gathered segment visible; what stands in its place is an unsealed copy or the same segment."""
    for _ in range(2):
        try:
            target.move(folder, final)
            # Only now: a kill before it leaves a folder that the next transfer finds and goes on with.
            target.remove(f"{final}/writer.json")
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
