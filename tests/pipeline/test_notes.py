"""The note of who is at work, step by step: other processes that come between any two of its calls of the file system,
and a kill at each."""

from __future__ import annotations

import errno
import io
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pipeline.store.errors import UserError
from pipeline.store.format.digest import digest_bytes
from pipeline.store.format.document import dump_document
from pipeline.store.segments.alive import describe_writer
from pipeline.train.fit.at_work import KIND, LOST, NOTE, Note, at_work
from tests import forks

CALLS = [(os, name) for name in ("open", "write", "rename", "replace", "link", "unlink")] + [(io, "open")]


def before_each(patch: pytest.MonkeyPatch, folder: Path, told: Callable[[], None]) -> None:
    """`told` is called before each call of the file system in `folder`, and before each write."""

    def stepped(call: Callable[..., Any]) -> Callable[..., Any]:
        def made(first: Any, *more: Any, **named: Any) -> Any:
            if isinstance(first, int) or str(first).startswith(str(folder)):
                told()
            return call(first, *more, **named)

        return made

    for module, name in CALLS:
        patch.setattr(module, name, stepped(getattr(module, name)))


class Steps:
    """Before the n-th call of the file system, while it is on, `at[n]` is done."""

    def __init__(self) -> None:
        self.at: dict[int, Callable[[], Any]] = {}
        self.count, self.on = 0, False

    def __call__(self) -> None:
        if self.on:
            self.on, todo = False, self.at.get(self.count)
            self.count += 1
            if todo:
                todo()
            self.on = True

    def counted(self, work: Callable[[], Any], at: dict[int, Callable[[], Any]]) -> int:
        """How many calls `work` makes, whose refusal counts as an end."""
        self.at, self.count, self.on = at, 0, True
        with suppress(UserError):
            work()
        self.on = False
        return self.count


@pytest.fixture
def steps(tmp_path, monkeypatch) -> Steps:
    made = Steps()
    before_each(monkeypatch, tmp_path / "out", made)
    return made


def killed_in(folder: Path) -> None:
    """The note of one that was killed."""
    folder.mkdir(exist_ok=True)
    (folder / NOTE).write_bytes(dump_document({"kind": KIND, **describe_writer(), "started": 1}))


def free(folder: Path) -> bool:
    """Whether one that comes two minutes from now is at work there, and leaves nothing. (Not sooner: half a note tells
    nobody.)"""
    for half in folder.iterdir():
        os.utime(half, (time.time() - LOST - 30,) * 2)
    with at_work(folder):
        assert [p.name for p in folder.iterdir()] == [NOTE]
    return not list(folder.iterdir())


class Others:
    """Processes that come to the folder and end there. `here`: those who are at work; `entered`: how many were; `most`:
    how many at a time."""

    def __init__(self, folder: Path, names: str) -> None:
        self.notes, self.here = {name: Note(folder) for name in names}, set[str]()
        self.entered = self.most = 0

    def take(self, name: str) -> None:
        try:
            self.notes[name].take()
        except UserError:
            return
        self.here.add(name)
        self.entered, self.most = self.entered + 1, max(self.most, len(self.here))

    def drop(self, name: str) -> None:
        self.notes[name].drop()
        self.here.discard(name)

    def end(self) -> None:
        for name in self.notes:
            self.drop(name)


@pytest.mark.parametrize("story", ["+b +d", "+b -b", "+b -b +d"])
def test_whoever_comes_while_a_dead_note_is_cleared_one_is_at_work(steps, tmp_path, story):
    """Before any call of the file system that C makes, and any later one."""
    folder, acts = tmp_path / "out", story.split()
    killed_in(folder)
    others = Others(folder, "c")
    calls = steps.counted(lambda: others.take("c"), {})
    others.end()
    assert calls > 4

    for places in itertools.combinations_with_replacement(range(calls + 4), len(acts)):
        killed_in(folder)
        others = Others(folder, "bcd")
        todo: dict[int, list[str]] = {}
        for place, act in zip(places, acts, strict=True):
            todo.setdefault(place, []).append(act)

        def do(acts: list[str], others: Others = others) -> None:
            for act in acts:
                (others.take if act[0] == "+" else others.drop)(act[1])

        steps.counted(lambda others=others: others.take("c"), {n: lambda a=a: do(a) for n, a in todo.items()})
        there = len(others.here)
        assert others.most == 1, f"{others.most} are at work after {story} at {places}"
        assert there or "-" in story, f"nobody is at work after {story} at {places}"
        assert (folder / NOTE).exists() == bool(there), f"{story} at {places}"
        others.end()
        assert free(folder), f"{story} at {places}"


def test_of_three_that_take_turns_at_every_call_one_is_at_work(tmp_path, monkeypatch):
    """Which one's turn it is, drawn: 150 times beside a dead note, 150 times beside a dead claim of one, too."""
    folder, back = tmp_path / "out", threading.Semaphore(0)
    turns: dict[int, threading.Semaphore] = {}

    def wait() -> None:
        if turn := turns.get(threading.get_ident()):
            back.release()
            turn.acquire()

    def come(others: Others, name: str, turn: threading.Semaphore) -> None:
        turns[threading.get_ident()] = turn
        wait()
        others.take(name)
        wait()
        others.drop(name)
        del turns[threading.get_ident()]
        back.release()

    before_each(monkeypatch, folder, wait)
    entered = 0
    for seed in range(300):
        rng = random.Random(seed)
        killed_in(folder)
        if seed % 2:
            claim = digest_bytes(NOTE.encode() + (folder / NOTE).read_bytes())
            (folder / f"{NOTE}.{claim}").write_bytes(dump_document({"kind": KIND, **describe_writer(), "started": 2}))
        others = Others(folder, "abc")
        queue = {name: threading.Semaphore(0) for name in "abc"}
        threads = {name: threading.Thread(target=come, args=(others, name, queue[name]), daemon=True) for name in "abc"}
        for thread in threads.values():
            thread.start()
            assert back.acquire(timeout=60)
        while alive := [name for name, thread in threads.items() if thread.is_alive()]:
            name = rng.choice(alive)
            queue[name].release()
            assert back.acquire(timeout=60)
            if threads[name].ident not in turns:
                threads[name].join()
        assert others.most < 2, f"seed {seed}"
        entered += others.entered
        assert free(folder), f"seed {seed}"
    assert entered > 300


@forks.needed
@pytest.mark.parametrize("cleared", [True, False])
def test_a_kill_at_any_step_bars_nobody(steps, tmp_path, cleared):
    """Of one that clears a dead note; also of one after the other, each beside what the ones before left."""
    folder, number = tmp_path / "out", 0
    killed_in(folder)
    while True:

        def work(number: int = number) -> int:
            steps.counted(Note(folder).take, {number: lambda: os.kill(os.getpid(), signal.SIGKILL)})
            return 0

        ended = forks.ended(forks.begun(work))
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        if cleared:
            assert free(folder), f"killed before call {number}"
            killed_in(folder)
        number += 1
    assert number > 4 and free(folder)


@pytest.mark.parametrize("name", ["write", "fsync"])
@pytest.mark.parametrize("dead", [True, False])
def test_a_note_that_cannot_be_written_is_taken_away(tmp_path, monkeypatch, name, dead):
    folder, handles = tmp_path / "out", []
    folder.mkdir()
    if dead:
        killed_in(folder)

    def full(handle: int, *data: bytes) -> int:
        handles.append(handle)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = [p.read_bytes() for p in folder.iterdir()]
    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left"), at_work(folder):
            pass
    assert handles and [p.read_bytes() for p in folder.iterdir()] == before
    for handle in handles:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(handle)
    assert free(folder)


def test_half_a_note_is_a_full_disk(tmp_path, monkeypatch):
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: write(handle, data[:9]))
        with pytest.raises(UserError, match="No space left"), at_work(tmp_path):
            pass
    assert free(tmp_path)


@forks.needed
def test_a_fork_that_leaves_the_block_leaves_the_note(tmp_path):
    with at_work(tmp_path):
        child = os.fork()
        if child:
            assert forks.ended(child) == 0
            assert (tmp_path / NOTE).exists()
    if not child:
        os._exit(0)
    assert not list(tmp_path.iterdir())
