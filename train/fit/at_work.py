"""Who is at work in the folder of a run, a sweep or a comparison: a second process says so, where it would do the work
again and write into the files of the first.

The note `.at-work.json` names the process and is touched every few seconds. It bars nobody for good: that of a process
which this machine knows to have ended counts no more, and where it cannot be looked for (another machine, another
container) neither does one that was not touched for two minutes, by the clock of the file system.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.store.errors import StoreError, UserError
from pipeline.store.format.document import dump_document, load_document
from pipeline.store.segments.alive import can_tell, describe_writer, is_dead

NOTE, KIND = ".at-work.json", "activation-writer"
BEAT, LOST = 15.0, 120.0  # seconds between two touches, and without one after which a process is taken for ended


class Note:
    """The note of this process in `folder`, which is there from `take` to `drop`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NOTE
        about = {"kind": KIND, "mark": secrets.token_hex(8), **describe_writer()}
        self._data, self._over, self._taken = dump_document(about), threading.Event(), False

    def take(self) -> None:
        """This process is at work in the folder; said once. UserError where another one is, or the folder cannot be
        written."""
        if self._taken:
            return
        try:
            while not self._written():
                _clear(self.path)
        except OSError as error:
            where = self.path.parent
            raise UserError(f"{where} cannot be written ({error.strerror or error}); choose another --out") from None
        self._taken = True

    def _written(self) -> bool:
        """Whether there was no note, and now is this one."""
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        os.write(handle, self._data)
        threading.Thread(target=self._beat, args=(handle,), name="at-work", daemon=True).start()
        return True

    def _beat(self, handle: int) -> None:
        # By its handle, so that the note of another, in its place, is not touched.
        while not self._over.wait(BEAT):
            with suppress(OSError):
                os.utime(handle)
        os.close(handle)

    def drop(self) -> None:
        """No longer at work there."""
        self._over.set()
        with suppress(OSError):
            if self.path.read_bytes() == self._data:
                self.path.unlink()


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Within it this process is at work in `folder`. UserError where another one is."""
    note = Note(folder)
    try:
        note.take()
        yield
    finally:
        note.drop()


def _clear(path: Path) -> None:
    """Take away the note at `path` where its process has ended. UserError where it has not."""
    try:
        data, touched = path.read_bytes(), path.stat().st_mtime
        with tempfile.TemporaryFile(prefix=NOTE, dir=path.parent) as file:
            silent = os.fstat(file.fileno()).st_mtime - touched
    except FileNotFoundError:
        return
    try:
        writer = load_document(data, path, KIND)
    except StoreError:  # half written, or not yet
        writer = {}
    if not (is_dead(writer) or (silent > LOST and not can_tell(writer))):
        raise UserError(_told(path.parent, writer, silent))
    aside = path.with_name(f"{NOTE}.{secrets.token_hex(8)}")
    with suppress(FileNotFoundError):  # another process was faster
        path.rename(aside)
        if aside.read_bytes() == data:
            aside.unlink()
        else:  # and is at work: its note is put back
            aside.rename(path)


def _told(folder: Path, writer: dict[str, Any], silent: float) -> str:
    host = str(writer.get("host")).partition("/")[0]
    who = f"process {writer.get('pid')} on {host}" if writer else "a process"
    heard = f" (last heard of {max(0.0, silent):.0f} s ago; after {LOST:.0f} s it is given up)"
    end = "" if can_tell(writer) else heard
    return f"{who} is at work in {folder}{end}: wait until it has ended, or give another --out"
