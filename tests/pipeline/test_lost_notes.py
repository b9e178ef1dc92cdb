"""A process whose note is lost writes no more; a copied note, and what is no note at all."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.commands import compare
from pipeline.store.errors import UserError
from pipeline.store.format.document import dump_document
from pipeline.store.segments.alive import describe_writer
from pipeline.train.fit import at_work as notes
from pipeline.train.fit.at_work import KIND, NOTE, Note, at_work
from pipeline.train.fit.log import write_json
from pipeline.train.fit.loop import Training
from pipeline.train.fit.run_files import RESUME, TUNER, save
from tests import forks
from tests.pipeline.test_at_work import command, killed, options, other, stay
from tests.pipeline.test_errors import refused, run

__all__ = ["options"]

OTHERS = dump_document({"kind": KIND, "mark": "another", **describe_writer()})


def removed(folder: Path) -> None:
    shutil.rmtree(folder)


def begun_anew(folder: Path) -> None:
    removed(folder)
    folder.mkdir()
    (folder / NOTE).write_bytes(OTHERS)


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("away"))
    folder.mkdir()
    (folder / NOTE).write_bytes(OTHERS)


def moved_and_bare(folder: Path) -> None:
    moved(folder)
    (folder / NOTE).unlink()


def claimed(folder: Path) -> None:
    """As after two minutes of silence, by a process of another machine."""
    (folder / "claim").write_bytes(OTHERS)
    (folder / "claim").replace(folder / NOTE)


def piped(folder: Path) -> None:
    (folder / NOTE).unlink()
    pipe(folder / NOTE)


def pipe(path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    os.mkfifo(path)


def standing(folder: Path) -> dict[str, Any]:
    return {p.name: p.read_bytes() if p.is_file() else None for p in folder.glob("*")} if folder.exists() else {}


@pytest.mark.parametrize("lose", [removed, begun_anew, moved, moved_and_bare, claimed, piped])
@pytest.mark.parametrize("where", ["", "run"])
def test_nothing_is_written_where_the_note_is_lost(tmp_path, monkeypatch, lose, where):
    """In its folder, and in those in it, by absolute and by relative names."""
    folder = tmp_path / "out"
    (folder / where).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with at_work(folder):
        write_json(folder / where / "metrics.json", {})
        save(folder / where / TUNER, {"a": torch.zeros(2)}, {})
        lose(folder)
        (folder / where).mkdir(exist_ok=True, parents=True)
        before = standing(folder / where)
        for base in (folder, Path("out")):
            with pytest.raises(UserError, match=r"out .*nothing more is written there"):
                write_json(base / where / "metrics.json", {"of": "the first"})
            for name in (TUNER, RESUME):
                with pytest.raises(UserError, match=r"out .*nothing more is written there"):
                    save(base / where / name, {"a": torch.ones(2)}, {})
        assert standing(folder / where) == before
        write_json(tmp_path / "elsewhere.json", {})
    assert standing(folder / where) == before


def test_a_note_lost_while_a_file_is_synced(tmp_path, monkeypatch):
    sync, folder = os.fsync, tmp_path / "out"
    folder.mkdir()
    with at_work(folder):

        def slow(handle: int) -> None:
            sync(handle)
            claimed(folder)

        monkeypatch.setattr(os, "fsync", slow)
        for write in (lambda: save(folder / TUNER, {}, {}), lambda: write_json(folder / "metrics.json", {})):
            with pytest.raises(UserError, match=f"another process has taken {folder} over"):
                write()
    assert [p.name for p in folder.iterdir()] == [NOTE]


def after_the_first_step(monkeypatch: pytest.MonkeyPatch, do: Callable[[], object]) -> list[int]:
    """`do` after the first step of a run; the steps that are made, as they are."""
    made, steps = Training.made, list[int]()

    def then(run: Training, *given: Any) -> None:
        made(run, *given)
        steps.append(run.state.step)
        if len(steps) == 1:
            do()

    monkeypatch.setattr(Training, "made", then)
    return steps


@forks.needed
@pytest.mark.parametrize("lose", [removed, begun_anew, moved, claimed])
@pytest.mark.parametrize("name", ["train", "sweep", "compare"])
def test_a_command_that_wakes_in_the_folder_of_another_writes_nothing(options, tmp_path, monkeypatch, name, lose):
    folder, before = tmp_path / "out", dict[str, Any]()

    def there() -> dict[str, Any]:
        """But for what goes to the log's old file, and the notes of a comparison in the folders of its runs."""
        own = (folder / "probe-s0" / NOTE, *(folder.rglob("log.jsonl") if lose is claimed else ()))
        return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p not in own}

    def taken() -> None:
        lose(folder)
        before.update(there())

    steps = after_the_first_step(monkeypatch, taken)
    refused(run(*command(name, options, folder)), str(folder), "nothing more is written there", "--out")
    assert steps and there() == before
    assert folder.exists() == (lose is not removed) and not list(folder.rglob("metrics.json"))


def test_a_beat_that_finds_the_note_gone_ends_the_training(options, tmp_path, monkeypatch):
    """At the next step, long before a checkpoint."""
    monkeypatch.setattr(notes, "BEAT", 0.01)

    def lose() -> None:
        begun_anew(tmp_path / "out")
        end = time.monotonic() + 60
        while not any(note.lost for note in notes.held()) and time.monotonic() < end:
            time.sleep(0.01)

    steps = after_the_first_step(monkeypatch, lose)
    words = [*command("train", options, tmp_path / "out"), "--batch-size", 4, "--max-steps", 4]
    refused(run(*words), f"another process has taken {tmp_path / 'out'} over")
    assert steps == [1] and standing(tmp_path / "out") == {NOTE: OTHERS}
    assert not notes.held()


@forks.needed
def test_a_comparison_takes_all_its_folders_before_it_trains(options, tmp_path, monkeypatch):
    """Those of tuners and baselines; also one that lies elsewhere, behind a link, where it would be barred midway."""
    far, out = tmp_path / "far", tmp_path / "out"
    far.mkdir()
    out.mkdir()
    (out / "probe-s1").symlink_to(far)
    words = [*command("compare", options, out), "--seeds", "0,1"]
    words[words.index("--tuners") + 1] = "probe,full"

    def begin(writing: int) -> None:
        monkeypatch.setattr(compare, "_runs", lambda *given: stay(writing))
        run(*words)

    child = other(out, begin)
    try:
        for folder in (far, *(out / f"{name}-s{seed}" for name in ("probe", "full") for seed in (0, 1))):
            refused(run(*command("train", options, folder)), f"process {child}", str(folder), "--out")
    finally:
        killed(child)

    child = other(far)
    try:
        refused(run(*words), f"process {child}", str(out / "probe-s1"))
    finally:
        killed(child)


def test_a_comparison_that_is_refused_leaves_no_folders_and_lends_each_once(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    with at_work(tmp_path, [first, second]):
        assert (first / NOTE).is_file() and (second / NOTE).is_file()
        with at_work(first):
            with pytest.raises(UserError, match="is at work in"), at_work(first):
                pass
            assert (first / NOTE).is_file()
        assert (first / NOTE).is_file()
        with at_work(first):
            (first / "metrics.json").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "metrics.json"]
    (tmp_path / "c").touch()
    with pytest.raises(UserError, match="cannot be made"), at_work(tmp_path, [second, tmp_path / "c"]):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "c"]


@forks.needed
def test_a_folder_copied_with_its_note_is_nobodys(options, tmp_path):
    """While the process of the first lives; a folder that was moved is still its own."""
    child = other(tmp_path / "o1")
    try:
        shutil.copytree(tmp_path / "o1", tmp_path / "o2")
        done = run(*command("train", options, tmp_path / "o2"))
        assert done.exit_code == 0 and not (tmp_path / "o2" / NOTE).exists(), done.output
        refused(run(*command("train", options, tmp_path / "o1")), f"process {child}")
        (tmp_path / "link").symlink_to(tmp_path / "o1")
        refused(run(*command("train", options, tmp_path / "link")), f"process {child}")
        (tmp_path / "o1").rename(tmp_path / "o3")
        refused(run(*command("train", options, tmp_path / "o3")), f"process {child}")
        shutil.copytree(tmp_path / "o3", tmp_path / "o1")  # of the same name: what the process would write to
        refused(run(*command("train", options, tmp_path / "o1")), f"process {child}")
    finally:
        killed(child)


def linked_nowhere(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


def linked(path: Path) -> None:
    path.with_name("file").write_bytes(OTHERS)
    path.symlink_to(path.with_name("file"))


@pytest.mark.parametrize("make", [linked_nowhere, linked, pipe, Path.mkdir])
@pytest.mark.parametrize("name", ["train", "sweep", "compare"])
def test_what_is_no_file_in_place_of_a_note_is_named(options, tmp_path, make, name):
    path = tmp_path / "out" / NOTE
    path.parent.mkdir()
    make(path)
    refused(run(*command(name, options, path.parent)), f"{path} is no regular file", "delete it", "--out")
    assert [p.name for p in path.parent.iterdir() if p.name != "file"] == [NOTE]


def test_what_is_no_file_in_a_folder_of_its_runs_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    pipe(tmp_path / "run" / NOTE)
    note = Note(tmp_path, runs=True)
    with pytest.raises(UserError, match=f"{tmp_path / 'run' / NOTE} is no regular file"):
        note.take([tmp_path / "run"])
    note.drop()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
