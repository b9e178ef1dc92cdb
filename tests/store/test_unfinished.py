"""What a live process is making or removing, and what a kill leaves of it, is not damage; gc never removes the last
sound copy."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.store import Space, Store, StoreError, weights
from pipeline.store.files.local import Files
from pipeline.store.format.document import dump_document
from pipeline.store.format.names import temporary_name
from pipeline.store.segments.alive import describe_writer
from pipeline.store.upkeep.repair import repair
from pipeline.store.upkeep.rewrite import compact
from pipeline.store.upkeep.transfer import transfer
from pipeline.store.upkeep.usage import collect, finish_removals, garbage, remove_space
from tests.store.helpers import IDENTITY, assert_equal, samples, sealed, snapshot, space
from tests.store.test_places import fill

DIGEST = "ab" * 16
TAIL = {"tail.safetensors": {"w": torch.ones(3)}, "config.json": {"n": 1}}


class Stopped(BaseException):
    """As a kill: no code of ours catches it."""


def stop_before(monkeypatch: pytest.MonkeyPatch, operation: str, wanted: Callable[[str], bool]) -> None:
    """Make the first `Files.operation` on a name that is `wanted` end the process, as far as it can tell."""
    original = getattr(Files, operation)

    def step(self: Files, name: str, *args: Any, **options: Any) -> Any:
        if wanted(name):
            raise Stopped
        return original(self, name, *args, **options)

    monkeypatch.setattr(Files, operation, step)


def dead_note() -> bytes:
    return dump_document({"kind": "activation-writer", **describe_writer(), "started": 1})


def bury(folder: Path) -> None:
    """Make whoever signed anything below `folder` a process that is dead."""
    for note in (*folder.rglob("writer*.json"), *folder.rglob("removing.json")):
        note.write_bytes(dead_note())


def half_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights whose writer stands just before their manifest."""
    with monkeypatch.context() as patch:
        stop_before(patch, "publish", lambda name: name.endswith(f"{DIGEST}/manifest.json"))
        with pytest.raises(Stopped):
            store.save_weights(DIGEST, TAIL)


def test_weights_that_are_being_written_are_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(tmp_path / "store")
    half_written(store, monkeypatch)
    before = snapshot(store.path)
    assert (store.path / "weights" / DIGEST / "tail.safetensors").exists()
    assert store.verify(deep=True) == []
    done = repair(store.where)
    assert not done.problems and not done.moved and snapshot(store.path) == before
    assert garbage(store).garbage == []


def test_a_writer_of_weights_that_was_killed_leaves_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = space(tmp_path, weights=DIGEST)
    store = Store(home.files)
    half_written(store, monkeypatch)
    bury(store.path)
    assert store.verify(deep=True) == []
    found = garbage(store)
    assert {Path(item.path).name for item in found.garbage} > {"tail.safetensors", "config.json"}
    # The next writer takes its place, note and all.
    store.save_weights(DIGEST, TAIL)
    assert store.verify(deep=True) == [] and garbage(store, older_than=0).garbage == []
    assert {p.name for p in (store.path / "weights" / DIGEST).iterdir()} == {*TAIL, "manifest.json"}


def test_weights_that_lost_their_manifest_are_damaged(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    store.save_weights(DIGEST, TAIL)
    (store.path / "weights" / DIGEST / "manifest.json").unlink()
    assert [p.file for p in store.verify()] == [f"weights/{DIGEST}/manifest.json"]
    assert repair(store.where).moved and store.verify(deep=True) == []


def test_repair_leaves_damaged_weights_to_whoever_is_writing_there(tmp_path: Path) -> None:
    """Their manifest is about to change: one of the two would lose what the other has written."""
    store = Store.create(tmp_path / "store")
    store.save_weights(DIGEST, TAIL)
    folder = store.path / "weights" / DIGEST
    (folder / "config.json").write_text("{}")
    note = folder / "writer-01234567.json"
    note.write_bytes(dump_document({"kind": "activation-writer", **describe_writer()}))
    done = repair(store.where)
    assert len(done.problems) == 1 and not done.moved
    note.write_bytes(dead_note())
    assert repair(store.where).moved and store.verify(deep=True) == []


def test_a_space_that_is_being_made_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(tmp_path / "store")
    stop_before(monkeypatch, "publish", lambda name: name.endswith("space.json"))
    with pytest.raises(Stopped):
        store.create_space(IDENTITY)
    (home,) = (store.path / "spaces").iterdir()
    (store.path / temporary_name(f"spaces/{home.name}/space.json")).write_bytes(b"{")
    assert store.verify(deep=True) == [] and not repair(store.where).problems


def test_a_segment_that_goes_while_it_is_verified_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when `gc` runs at the same time."""
    home = space(tmp_path)
    segment = sealed(home, [1, 2])
    original = Files.sizes

    def sizes(self: Files, folder: str, names: Any) -> Any:
        shutil.rmtree(segment.path)
        return original(self, folder, names)

    monkeypatch.setattr(Files, "sizes", sizes)
    assert home.verify(deep=True) == []


def test_unfinished_files_are_garbage_wherever_they_are(tmp_path: Path) -> None:
    store = fill(tmp_path)
    (home,) = store.spaces()
    segment = home.segments()[0]
    table = home.tables()[0].path
    (store.path / f"spaces/{home.id}/superseded").mkdir()
    places = [f"{segment.folder}/manifest.json", f"weights/{DIGEST}/tail.safetensors", table, "store.json",
              f"spaces/{home.id}/space.json", f"spaces/{home.id}/superseded/{segment.id}"]  # fmt: skip
    left = {temporary_name(place) for place in places}
    for name in left:
        (store.path / name).write_bytes(b"half")
    assert store.verify(deep=True) == [] and not repair(store.where).problems
    found = garbage(store, older_than=0)
    assert {item.path for item in found.garbage} == left
    collect(store, found)
    assert not [name for name in left if (store.path / name).exists()] and store.verify(deep=True) == []


def test_a_killed_transfer_leaves_no_stranger_in_the_sealed_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was to be renamed stays in the incoming folder, which the next transfer goes on with."""
    source = fill(tmp_path / "a")
    target = Store.create(tmp_path / "b" / "store")

    def replace(self: Path, to: Path) -> Any:
        if to.name == "manifest.json":
            raise Stopped
        return self.rename(to)

    weights.add_bytes(target.files, DIGEST, weights.stored_bytes(source.files, DIGEST, None))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        patch.setattr(Files, "remove", lambda self, name: None)  # a kill tidies nothing
        with pytest.raises(Stopped):
            transfer(source, target)
    incoming = next(target.path.glob("spaces/*/segments/.incoming-*"))
    assert list(incoming.glob(".manifest.json.*.tmp"))
    bury(target.path)
    done = transfer(source, target)
    assert not done.problems and done.resumed_bytes
    assert target.verify(deep=True) == [] and not list(target.path.rglob("*.tmp"))
    assert not list(target.path.rglob("writer*.json")) and not list(target.path.rglob(".incoming-*"))


def test_a_killed_transfer_leaves_no_table_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fill(tmp_path / "a")
    target = Store.create(tmp_path / "b" / "store")
    with monkeypatch.context() as patch:
        stop_before(patch, "publish", lambda name: name.startswith("weights/"))
        with pytest.raises(Stopped):
            transfer(source, target)
    bury(target.path)
    assert target.verify(deep=True) == []
    assert not transfer(source, target).problems
    assert target.verify(deep=True) == [] and target.has_weights(DIGEST, "tail.safetensors")


def compacted(tmp_path: Path) -> tuple[Space, list[str], list[str]]:
    """A space written anew as one segment; the ids of the old segments and of the new one."""
    home = space(tmp_path)
    old = [sealed(home, [1, 2]).id, sealed(home, [3, 4]).id]
    compact(home)
    return home, old, [s.id for s in home.segments()]


@pytest.mark.parametrize("damage", ["rotted", "gone", "chunk gone"])
def test_gc_keeps_the_last_sound_copy(tmp_path: Path, damage: str) -> None:
    home, old, new = compacted(tmp_path)
    store = Store(home.files)
    folder = home.path / "segments" / new[0]
    chunk = folder / "encoder.3" / "c.0.0"
    if damage == "gone":
        shutil.rmtree(folder)
    elif damage == "rotted":
        data = chunk.read_bytes()
        chunk.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    else:
        chunk.unlink()
    found = garbage(store, older_than=0)
    assert found.garbage == [] and len(found.kept) == 2 and all(i in " ".join(found.kept) for i in old)
    collect(store, found)
    repair(store.where)
    home = Store.open(store.where).space(home.id)
    found_samples = [s.read(list(s.states), list(s.columns)) for s in home.segments() if s.id in old]
    assert_equal(found_samples[0], samples([1, 2]))
    assert_equal(found_samples[1], samples([3, 4]))


def test_gc_removes_what_stands_elsewhere_even_after_two_compactions(tmp_path: Path) -> None:
    home, old, new = compacted(tmp_path)
    store = Store(home.files)
    sealed(home, [5])
    compact(home)
    shutil.rmtree(home.path / "segments" / new[0])  # the first successor went, the second holds all
    found = garbage(store, older_than=0)
    assert not found.kept
    collect(store, found)
    assert len(list((home.path / "segments").iterdir())) == 1 and sorted(home.stored()) == sorted(
        k for n in ([1, 2], [3, 4], [5]) for k in samples(n).keys
    )
    assert store.verify(deep=True) == [] and garbage(store, older_than=0).garbage == [] and old


def test_a_space_whose_removal_was_killed_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fill(tmp_path)
    (home,) = store.spaces()
    with monkeypatch.context() as patch:
        stop_before(patch, "remove", lambda name: name.endswith("manifest.json"))
        with pytest.raises(Stopped):
            remove_space(store, home)
    bury(store.path)
    assert list(home.path.rglob("manifest.json"))
    assert Store.open(store.where).spaces() == [] and store.verify(deep=True) == []
    assert not repair(store.where).problems
    with pytest.raises(StoreError, match="there is no feature space"):
        store.space(home.id[:8])
    for way in ("rm", "gc", "extract"):
        copy = tmp_path / way
        shutil.copytree(store.path, copy)
        again = Store.open(copy)
        if way == "rm":
            assert finish_removals(again, home.id[:8]) == [home.id]
        elif way == "gc":
            collect(again, garbage(again))
        else:
            assert again.create_space(home.identity).segments() == []
        left = [p for p in (copy / "spaces").rglob("*") if p.is_file()]
        assert [p.name for p in left] == (["space.json"] if way == "extract" else []), way


def test_a_space_is_not_made_while_another_process_removes_it(tmp_path: Path) -> None:
    home = space(tmp_path)
    (home.path / "removing.json").write_bytes(dump_document({"kind": "activation-writer", **describe_writer()}))
    with pytest.raises(StoreError, match="is being removed"):
        Store(home.files).create_space(home.identity)


@pytest.mark.parametrize("what", ["gc", "rm"])
def test_a_read_only_store_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Root may write anywhere, so the disk's answer is played."""
    store = fill(tmp_path)
    (home,) = store.spaces()
    (store.path / temporary_name("store.json")).write_bytes(b"half")
    found = garbage(store, older_than=0)
    assert found.garbage

    def refuse(*args: Any, **options: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("unlink", "rename", "replace", "mkdir"):
        monkeypatch.setattr(Path, name, refuse)
    monkeypatch.setattr(Files, "write", refuse)
    with pytest.raises(StoreError, match=r"no permission while removing .*Read-only file system") as caught:
        collect(store, found) if what == "gc" else remove_space(store, home)
    assert "\n" not in str(caught.value)


def test_a_full_disk_keeps_nobody_from_removing_a_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fill(tmp_path)
    (home,) = store.spaces()

    def full(*args: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Files, "write", full)
    assert remove_space(store, home) and not home.path.exists()


def test_gc_killed_among_weights_leaves_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(tmp_path / "store")
    store.save_weights(DIGEST, TAIL)
    found = garbage(store, older_than=0)
    with monkeypatch.context() as patch:
        stop_before(patch, "remove", lambda name: name.endswith("tail.safetensors"))
        with pytest.raises(Stopped):
            collect(store, found)
    bury(store.path)
    assert (store.path / "weights" / DIGEST / "tail.safetensors").exists()
    assert store.verify(deep=True) == []
    collect(store, garbage(store, older_than=0))
    assert not (store.path / "weights" / DIGEST).exists()
