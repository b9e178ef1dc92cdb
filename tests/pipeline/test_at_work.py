"""Two processes in one folder: the second says who is at work there, and one that was killed bars nobody."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.store.format.document import dump_document
from pipeline.store.segments.alive import describe_writer
from pipeline.train.fit import at_work
from pipeline.train.fit.at_work import BEAT, LOST, NOTE
from tests import forks
from tests.pipeline.test_errors import refused, run

pytestmark = forks.needed


@pytest.fixture(scope="module")
def options(checkpoints, table, tmp_path_factory) -> list[Any]:
    found = ["--model", checkpoints["bert"], "--task", table, "--store", tmp_path_factory.mktemp("work") / "store"]
    made = run("extract", *found, "--text", "first", "--label", "label", "--for", "probe", "--limit", 24)
    assert made.exit_code == 0, made.output
    return [*found, "--tuner", "probe", "--max-steps", 2]


def stay(writing: int) -> None:
    os.write(writing, b"!")
    time.sleep(90)


def other(folder: Path, begin: Callable[[int], object] | None = None) -> int:
    """A process at work in `folder`, or in what `begin` does, until it is killed. It is there once it calls `stay`."""
    reading, writing = os.pipe()

    def work() -> int:
        if begin:
            begin(writing)
            return 1
        with at_work.at_work(folder):
            stay(writing)
        return 0

    folder.mkdir(parents=True, exist_ok=True)
    child = forks.begun(work)
    os.close(writing)
    assert os.read(reading, 1) == b"!"
    os.close(reading)
    return child


def killed(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    assert forks.ended(child) == -signal.SIGKILL


def command(name: str, options: list[Any], folder: Path) -> list[Any]:
    if name == "compare":
        at = options.index("--tuner")
        return [name, *options[:at], "--tuners", "probe", *options[at + 2 :], "--out", folder]
    return [name, *options, "--out", folder]


@pytest.mark.parametrize("name", ["train", "sweep", "compare"])
def test_a_second_process_says_who_is_at_work_and_goes_on_after_a_kill(options, tmp_path, name):
    words = command(name, options, tmp_path / "out")
    child = other(tmp_path / "out")
    try:
        line = refused(run(*words), f"process {child}", str(tmp_path / "out"), "--out")
        assert [p.name for p in (tmp_path / "out").iterdir()] == [NOTE], line
    finally:
        killed(child)
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "out" / NOTE).exists() and not list((tmp_path / "out").glob(".*"))


def test_what_another_has_finished_meanwhile_is_not_trained_again(options, tmp_path, monkeypatch):
    """Between the first look and the note of its own."""
    from pipeline.commands import train

    done = run(*command("train", options, tmp_path / "first"))
    assert done.exit_code == 0, done.output
    monkeypatch.setattr(train, "make_folder", lambda folder: (tmp_path / "first").rename(folder))
    refused(run(*command("train", options, tmp_path / "run")), "holds a finished run", "--overwrite")


@pytest.mark.parametrize(("name", "where"), [("sweep", "_train"), ("compare", "_runs")])
def test_what_trains_many_runs_is_at_work_in_their_folders(options, tmp_path, monkeypatch, name, where):
    """Another process trains one of them; and one that does already bars the whole."""
    from pipeline.commands import compare, sweep

    words, run_folder = command(name, options, tmp_path / "out"), tmp_path / "out" / "probe-s0"

    def begin(writing: int) -> None:
        monkeypatch.setattr({"sweep": sweep, "compare": compare}[name], where, lambda *given: stay(writing))
        run(*words)

    child = other(tmp_path / "out", begin)
    try:
        line = refused(run(*command("train", options, run_folder)), f"process {child}", str(run_folder), "--out")
        if name == "sweep":
            assert f"in {tmp_path / 'out'}, where" in line and not list(run_folder.iterdir())
        else:  # a note in each of them
            assert [p.name for p in run_folder.iterdir()] == [NOTE]
        monkeypatch.chdir(run_folder)
        refused(run(*command("train", options, Path())), f"process {child}")
    finally:
        killed(child)

    child = other(run_folder)
    try:
        refused(run(*words), f"process {child}", f"in {run_folder}", "--out")
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["probe-s0"]
    finally:
        killed(child)
    done = run(*words)
    assert done.exit_code == 0 and (run_folder / "metrics.json").is_file(), done.output


def test_a_run_bars_no_run_in_a_folder_of_its_own(options, tmp_path):
    child = other(tmp_path / "out")
    try:
        assert run(*command("train", options, tmp_path / "out" / "probe-s0")).exit_code == 0
    finally:
        killed(child)


def note_of(folder: Path, writer: dict[str, Any], age: float) -> None:
    folder.mkdir()
    (folder / NOTE).write_bytes(dump_document({"kind": "activation-writer", **writer}))
    os.utime(folder / NOTE, (time.time() - age,) * 2)


@pytest.mark.parametrize(
    ("writer", "age", "barred"),
    [
        ({"host": "elsewhere", "pid": 7, "started": 1}, 2 * BEAT, True),  # beats
        ({"host": "elsewhere", "pid": 7, "started": 1}, LOST + 30, False),  # no longer
        ({**describe_writer(), "started": 1}, 0.0, False),  # another process had our id
    ],
)
def test_one_of_another_machine_is_known_by_its_beat(options, tmp_path, writer, age, barred):
    note_of(tmp_path / "out", writer, age)
    found = run(*command("train", options, tmp_path / "out"))
    if barred:
        refused(found, "process 7 on elsewhere", f"{LOST:.0f} s")
    else:
        assert found.exit_code == 0 and (tmp_path / "out" / "metrics.json").is_file(), found.output


def test_a_note_from_the_future_says_what_to_delete(options, tmp_path):
    """Of a machine, or a disk, whose clock is a year ahead."""
    note_of(tmp_path / "out", {"host": "elsewhere", "pid": 7, "started": 1}, -365 * 86400.0)
    words = command("train", options, tmp_path / "out")
    line = refused(run(*words), "process 7 on elsewhere", "future", f"delete {tmp_path / 'out' / NOTE}", "--out")
    assert "0 s ago" not in line
    os.utime(tmp_path / "out" / NOTE, (time.time() + LOST / 2,) * 2)  # a clock that is a little ahead
    refused(run(*words), "is at work", f"after {LOST:.0f} s it is given up")
    (tmp_path / "out" / NOTE).unlink()
    assert run(*words).exit_code == 0


@pytest.mark.parametrize("torn", [b"", b"{", b'{"pid": 3}'])
def test_a_torn_note_bars_for_a_while(options, tmp_path, torn):
    note_of(tmp_path / "out", {}, 0.0)
    (tmp_path / "out" / NOTE).write_bytes(torn)
    refused(run(*command("train", options, tmp_path / "out")), "a process", f"{LOST:.0f} s")
    os.utime(tmp_path / "out" / NOTE, (time.time() - LOST - 30,) * 2)
    assert run(*command("train", options, tmp_path / "out")).exit_code == 0


def test_the_note_beats_and_is_taken_away_by_its_owner_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(at_work, "BEAT", 0.01)
    with at_work.at_work(tmp_path):
        os.utime(tmp_path / NOTE, (0, 0))
        end = time.monotonic() + 60
        while (tmp_path / NOTE).stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert (tmp_path / NOTE).stat().st_mtime > 0
        (tmp_path / NOTE).unlink()
        (tmp_path / NOTE).write_bytes(b"another's")
    assert (tmp_path / NOTE).read_bytes() == b"another's"


def test_of_many_at_once_one_is_at_work(tmp_path):
    """Beside the note of one that was killed, which all of them take away."""
    note_of(tmp_path / "out", {**describe_writer(), "started": 1}, 0.0)
    go, told = tmp_path / "go", tmp_path / "told"
    told.mkdir()

    def work() -> int:
        while not go.exists():
            time.sleep(0.001)
        try:
            with at_work.at_work(tmp_path / "out"):
                (told / str(os.getpid())).write_text("at work")
                time.sleep(1.0)
        except Exception as error:
            (told / f"{os.getpid()}-not").write_text(str(error))
        return 0

    children = [forks.begun(work) for _ in range(8)]
    go.touch()
    assert [forks.ended(child) for child in children] == [0] * 8
    said = [p.name for p in told.iterdir()]
    assert len(said) == 8 and sum(not name.endswith("-not") for name in said) == 1
    assert not list((tmp_path / "out").iterdir())


def test_a_sweep_of_which_a_process_was_killed_goes_on(options, tmp_path):
    """SIGKILL while it trains, as the machine's owner would."""
    words = command("sweep", options, tmp_path / "out")

    def work() -> int:
        from pipeline.train.fit.loop import Training

        Training.made = lambda self, *given: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        return run(*words).exit_code

    assert forks.ended(forks.begun(work)) == -signal.SIGKILL
    assert (tmp_path / "out" / NOTE).is_file()
    done = run(*words, "--json")
    assert done.exit_code == 0, done.output
    assert [row["status"] for row in json.loads(done.stdout)["runs"]] == ["done"]
