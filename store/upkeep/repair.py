"""Putting damage aside, so that the next `extract` fills exactly the hole.

What is sound of a damaged segment is written anew first; the damaged one then moves to `quarantine/`, where no reader
looks and a person may. A damaged `space.json`, task table or weights folder moves there too: extracting again writes
them anew, and the segments of the space are found again. `store.json` is the same in every store and is written anew.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from pipeline.store import weights
from pipeline.store.errors import StoreError
from pipeline.store.files.local import Files
from pipeline.store.files.places import open_files
from pipeline.store.format.document import dump_document, load_document
from pipeline.store.format.names import FORMAT, MAX_SMALL_JSON, QUARANTINE, is_key, segment_path, space_path
from pipeline.store.segments.index import Bundle, bundles
from pipeline.store.segments.segment import NotSealed, Problem, Segment
from pipeline.store.segments.unsealed import lost_manifest
from pipeline.store.space import LOST, Space, has_space, lost_identity, still_sealed
from pipeline.store.store import KIND
from pipeline.store.upkeep.references import missing_tables, read_named
from pipeline.store.upkeep.rewrite import salvage


@dataclass
class Repaired:
    """What was done. `lost`: samples that lost a state, `absent`: that lost all; `moved`: what is in quarantine."""

    problems: list[dict[str, Any]] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    rewritten: int = 0
    lost: int = 0
    absent: int = 0


def repair(where: str, dry_run: bool = False) -> Repaired:
    """Look at every byte of the store at `where` and put aside what is damaged; with `dry_run` only say what is."""
    files = open_files(where).fresh()
    done = Repaired()
    if not _store_file(files, done, dry_run):
        return done
    for name in files.names("spaces"):
        # What another process is just making or removing is not there, and not to be touched.
        there = is_key(name) and has_space(files, name)
        if not is_key(name) or not (there or lost_identity(files, name)):
            continue
        try:
            space = Space(files, name)
        except StoreError as error:
            done.problems.append({"file": f"{space_path(name)}/space.json", "what": str(error)})
            if there:
                _aside(files, f"{space_path(name)}/space.json", done, dry_run)
            continue
        _repair_space(space, done, dry_run)
    for digest in files.names("weights"):
        found = weights.verify(files, digest, deep=True)
        done.problems += [{"file": file, "what": what} for file, what in found]
        if found:
            _repair_weights(files, digest, {file for file, _ in found}, done, dry_run)
    return done


def _repair_weights(files: Files, digest: str, bad: set[str], done: Repaired, dry_run: bool) -> None:
    """Put aside the damaged files of a checkpoint and keep the sound ones, a projection's fit above all: it cannot be
    made again. Without a sound manifest nothing tells which are sound, so all go."""
    folder = f"weights/{digest}"
    if is_key(digest) and weights.being_written(files, digest):
        return  # Its manifest is about to change: named as damaged, and left to a repair that nobody races with.
    try:
        listed = weights.listed(files, digest) if is_key(digest) else None
    except StoreError:
        listed = None
    sound = {n: entry for n, entry in (listed or {}).items() if f"{folder}/{n}" not in bad}
    if not sound:
        _aside(files, folder, done, dry_run)
        return
    for file in sorted(bad):
        _aside(files, file, done, dry_run)
    if not dry_run:
        weights.publish_manifest(files, digest, sound)


def damage(segment: Segment, problems: list[Problem]) -> dict[str, Any]:
    """What a damaged segment's problems mean: its states and how many of its samples."""
    states = sorted({p.file.split("/", 1)[0].removesuffix(".scale") for p in problems if "/" in p.file})
    return {"segment": segment.id, "states": states, "samples": len(segment), "what": [p.what for p in problems]}


def _store_file(files: Files, done: Repaired, dry_run: bool) -> bool:
    try:
        load_document(files.read("store.json", MAX_SMALL_JSON), files.where("store.json"), KIND)
        return True
    except (StoreError, FileNotFoundError) as error:
        if "newer version" in str(error) or not files.names("spaces"):
            raise StoreError(f"{files.root} is not a store that this version can repair") from None
        what = str(error) if isinstance(error, StoreError) else "is missing"
        done.problems.append({"file": "store.json", "what": what})
        if not dry_run:
            _aside(files, "store.json", done, dry_run)
            files.publish("store.json", dump_document({"kind": KIND, "format": FORMAT}))
        return not dry_run


def _repair_space(space: Space, done: Repaired, dry_run: bool) -> None:
    files, bad = space.files, {}
    opened: list[Segment] = []
    superseded = set(space.superseded())
    for name in files.names(f"{space_path(space.id)}/segments"):
        folder = segment_path(space.id, name)
        if name.startswith("."):
            continue
        if files.size(f"{folder}/manifest.json") is None:
            if lost_manifest(files, folder):
                done.problems.append({"segment": name, "file": f"{folder}/manifest.json", "what": LOST})
                _aside(files, folder, done, dry_run)
            continue
        try:
            segment = Segment(files, space.id, name)
        except NotSealed:
            continue
        except StoreError as error:
            done.problems.append({"segment": name, "file": f"{folder}/manifest.json", "what": str(error)})
            _aside(files, folder, done, dry_run)
            continue
        problems = still_sealed(files, space.id, name, segment.verify(deep=True))
        if problems:
            bad[name] = problems
            done.problems.append(damage(segment, problems))
        if name not in superseded:
            opened.append(segment)
        elif problems:
            _aside(files, folder, done, dry_run)
    there = {s.id for s in opened} | superseded.intersection(files.names(f"{space_path(space.id)}/segments"))
    for segment in opened:
        if segment.base is not None and segment.base not in there:
            done.problems.append({"segment": segment.id, "what": f"supplements {segment.base}, which is gone"})
            _aside(files, segment.folder, done, dry_run)
    for bundle in bundles(opened):
        members = [bundle.base, *bundle.supplements]
        if not dry_run and any(s.id in bad for s in members):
            _repair_bundle(space, bundle, done)
    folder = f"{space_path(space.id)}/tasks"
    named = read_named(files, folder)
    for path, what in (*named.damaged, *missing_tables(files, folder, named)):
        done.problems.append({"file": path, "what": what})
        _aside(files, path, done, dry_run)
    _show_again(space, done, dry_run)


def _repair_bundle(space: Space, bundle: Bundle, done: Repaired) -> None:
    written, lost, absent = salvage(space, bundle)
    done.rewritten += len(written)
    done.lost += lost
    done.absent += absent
    for segment in (*reversed(bundle.supplements), bundle.base):
        _aside(space.files, segment.folder, done, False)


def _show_again(space: Space, done: Repaired, dry_run: bool) -> None:
    """Unhide the segments whose samples were written anew in what is now in quarantine: `gc` has not removed them."""
    files, home = space.files, space_path(space.id)
    there = set(files.names(f"{home}/segments"))
    for name in space.superseded():
        marker = f"{home}/superseded/{name}"
        try:
            if not dry_run and not there.issuperset(space.successors(name)):
                files.remove(marker)
        except StoreError as error:
            done.problems.append({"file": marker, "what": str(error)})
            _aside(files, marker, done, dry_run)


def _aside(files: Files, name: str, done: Repaired, dry_run: bool) -> None:
    """Move a file or folder to the quarantine."""
    if dry_run:
        return
    files.make(QUARANTINE)
    place = f"{QUARANTINE}/{name.replace('/', '--')}-{secrets.token_hex(3)}"
    if files.local or files.size(name) is None:
        try:
            files.move(name, place)
        except FileNotFoundError:
            return
    else:
        files.publish(place, files.read(name, MAX_SMALL_JSON * 256))
        files.remove(name)
    done.moved.append(place)
