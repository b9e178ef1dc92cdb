"""Who is at work in the folder of a run, a sweep or a comparison: a second process says so, where it would do the work
again and write into the files of the first. A sweep and a comparison are at work in the folders of their runs, too.

The note `.at-work.json` names the process and is touched every few seconds. It bars nobody for good: that of a process
which this machine knows to have ended counts no more, and where it cannot be looked for (another machine, another
container) neither does one that was not touched for two minutes, by the clock of the file system.

The note of a process that lives is moved and taken away by that process alone. Who finds a dead one claims it: it makes
a note of its own whose name follows from the dead one's bytes, which one process can do; sees that the dead one is
still there; and renames its own over it. From then on those bytes never stand there again, so that whoever comes late
with the same claim sees that it is void. A claim left by a kill is a dead note like any other, and is claimed.
"""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.store.errors import StoreError, UserError
from pipeline.store.format.digest import digest_bytes
from pipeline.store.format.document import dump_document, load_document
from pipeline.store.segments.alive import can_tell, describe_writer, is_dead

NOTE, KIND = ".at-work.json", "activation-writer"
BEAT, LOST = 15.0, 120.0  # seconds between two touches, and without one after which a process is taken for ended


class Note:
    """The note of this process in `folder`, which is there from `take` to `drop`. `runs`: whether folders in it are
    those of runs that it trains."""

    def __init__(self, folder: Path, runs: bool = False) -> None:
        self.path, self._pid = folder / NOTE, os.getpid()
        about = {"kind": KIND, "mark": secrets.token_hex(8), "runs": runs, **describe_writer()}
        self._data, self._over, self._taken = dump_document(about), threading.Event(), False

    def take(self, runs: Iterable[Path] = ()) -> None:
        """This process is at work in the folder, said once, and in the folders `runs`, where it will train. UserError
        where another one is, or the folder cannot be written."""
        where = self.path.parent
        try:
            if not self._taken:
                handle = self._placed(self.path)
                self._taken = True
                threading.Thread(target=self._beat, args=(handle,), name="at-work", daemon=True).start()
                for void in where.glob(f"{NOTE}.*"):  # claims of a note that is no longer there
                    void.unlink(missing_ok=True)
            # After our note is there: of two processes that come at once, one at least sees the other.
            self._look(runs)
        except OSError as error:
            raise UserError(f"{where} cannot be written ({error.strerror or error}); choose another --out") from None

    def _placed(self, path: Path) -> int:
        """The handle of this note, which is at `path` now; in place of a dead one. UserError where one lives there."""
        while True:
            with suppress(FileExistsError):
                return self._written(path)
            found = _Found.at(path, self.path.parent)
            if found is None:
                continue
            if not found.ended:
                raise UserError(found.told())
            claim = path.with_name(f"{NOTE}.{digest_bytes(path.name.encode() + found.data)}")
            handle = self._placed(claim)
            try:
                if found.is_at(path):
                    claim.replace(path)
                    return handle
            except FileNotFoundError:  # void, and was taken away
                pass
            except BaseException:
                os.close(handle)
                raise
            finally:
                claim.unlink(missing_ok=True)
            os.close(handle)

    def _written(self, path: Path) -> int:
        """The handle of this note, new at `path`. FileExistsError where there is one."""
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            if os.write(handle, self._data) < len(self._data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle)  # other machines see it from here on
        except BaseException:
            os.close(handle)
            path.unlink(missing_ok=True)
            raise
        return handle

    def _beat(self, handle: int) -> None:
        # By its handle, so that the note of another, in its place, is not touched.
        while not self._over.wait(BEAT):
            with suppress(OSError):
                os.utime(handle)
        os.close(handle)

    def _look(self, runs: Iterable[Path]) -> None:
        """UserError where another process trains what lies in the folder around, or lives in one of `runs`."""
        where = self.path.parent
        around = _Found.at(where.resolve().parent / NOTE, where)
        if around and around.writer.get("runs") and not around.ended and not around.ours:
            raise UserError(around.told(f", where {where} lies"))
        for run in runs:
            found = _Found.at(run / NOTE, where)
            if found and not found.ended:
                raise UserError(found.told())

    def drop(self) -> None:
        """No longer at work there. In a fork of the process that made it, nothing: that one still is."""
        if os.getpid() != self._pid:
            return
        self._over.set()
        with suppress(OSError):
            if self.path.read_bytes() == self._data:
                self.path.unlink()


@contextmanager
def at_work(folder: Path, runs: Sequence[Path] = ()) -> Iterator[None]:
    """Within it this process is at work in `folder`, and trains `runs` in it. UserError where another one does."""
    note = Note(folder, runs=bool(runs))
    try:
        note.take(runs)
        yield
    finally:
        note.drop()


@dataclass(frozen=True)
class _Found:
    """A note at `path`: its bytes, when it was last touched, in ns, how many seconds ago, and the process it names
    (empty where half of it is written)."""

    path: Path
    data: bytes
    touched: int
    silent: float
    writer: dict[str, Any]

    @classmethod
    def at(cls, path: Path, clock: Path) -> _Found | None:
        """None where there is none. `clock`: a folder of that file system, which tells what time it is."""
        try:
            data, touched = _read(path)
        except FileNotFoundError:
            return None
        with tempfile.TemporaryFile(prefix=NOTE, dir=clock) as file:
            silent = (os.fstat(file.fileno()).st_mtime_ns - touched) / 1e9
        try:
            writer = load_document(data, path, KIND)
        except StoreError:  # half written, or not yet
            writer = {}
        return cls(path, data, touched, silent, writer)

    @property
    def ended(self) -> bool:
        return is_dead(self.writer) or (self.silent > LOST and not can_tell(self.writer))

    @property
    def ours(self) -> bool:
        return describe_writer().items() <= self.writer.items()

    def is_at(self, path: Path) -> bool:
        """Whether it is still there, and was not touched."""
        with suppress(FileNotFoundError):
            return _read(path) == (self.data, self.touched)
        return False

    def told(self, about: str = "") -> str:
        """Who is at work; `about`: more on where."""
        folder, host = self.path.parent, str(self.writer.get("host")).partition("/")[0]
        who = f"process {self.writer.get('pid')} on {host}" if self.writer else "a process"
        if can_tell(self.writer):
            heard = ""
        elif self.silent < -LOST:
            return (
                f"{who} may be at work in {folder}{about}: its note was touched {-self.silent:.0f} s in the future, "
                f"so nobody can tell; delete {self.path} if nobody is, or give another --out"
            )
        else:
            heard = f" (last heard of {max(0.0, self.silent):.0f} s ago; after {LOST:.0f} s it is given up)"
        return f"{who} is at work in {folder}{about}{heard}: wait until it has ended, or give another --out"


def _read(path: Path) -> tuple[bytes, int]:
    """The bytes of a note, and when it was touched, in ns."""
    with path.open("rb") as file:
        return file.read(), os.fstat(file.fileno()).st_mtime_ns
