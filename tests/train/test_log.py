"""Files that are written at once: what they stand in the place of."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest

from pipeline.store.errors import UserError
from pipeline.terminal import write_entries
from pipeline.train.fit import log
from pipeline.train.fit.log import write_bytes

ROWS = [{"id": "1", "label": "a"}]


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path) -> None:
    """As /dev/stdout, and as /dev/null, whose place a file would take for everybody."""
    fifo, read = tmp_path / "rows.csv", list[str]()
    os.mkfifo(fifo)
    reader = Thread(target=lambda: read.append(fifo.read_text()))
    reader.start()
    write_entries(fifo, ROWS)
    reader.join(timeout=60)
    assert read == ["id,label\n1,a\n"] and fifo.is_fifo() and [*tmp_path.iterdir()] == [fifo]


def test_the_file_that_a_link_names_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, file = tmp_path / "rows.csv", tmp_path / "there" / "rows.csv"
    file.write_text("old")
    link.symlink_to(file)
    write_bytes(link, b"new")
    assert link.is_symlink() and file.read_text() == "new"


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(partial: Path, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log, "replace", full)
    (tmp_path / "rows.csv").write_text("old")
    with pytest.raises(UserError, match=r"rows.csv: cannot be written: No space left on device"):
        write_entries(tmp_path / "rows.csv", ROWS)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.csv"] and (tmp_path / "rows.csv").read_text() == "old"


def test_standard_output_goes_on_where_it_stands(tmp_path: Path) -> None:
    """Though it is a file: what stands there, and what follows, is kept."""
    code = (
        "import sys; from pathlib import Path; from pipeline.terminal import write_entries; "
        f"write_entries(Path(sys.argv[1]), {ROWS})"
    )
    for name, path in (("out", "/dev/stdout"), ("three", "/dev/fd/3")):
        line = f"(echo before; {sys.executable} -c {shlex.quote(code)} {path}; echo after) > {name} 3>&1"
        subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True, timeout=120)
        assert (tmp_path / name).read_text() == "before\nid,label\n1,a\nafter\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "three"]
