"""Who is at work in the folder of a run, a sweep or a comparison: a second process says so, where it would do the work
again and write into the files of the first. A sweep and a comparison are at work in the folders of their runs, too.

The note `.at-work.json` names the process and is touched every few seconds. It bars nobody for good: that of a process
which this machine knows to have ended counts no more, and where it cannot be looked for (another machine, another
container) neither does one that was not touched for two minutes, by the clock of the file system.

The note of a process that lives is moved and taken away by that process alone. Who finds a dead one claims it: it makes
a note of its own whose name follows from the dead one's bytes, which one process can do; sees that the dead one is
still there; and renames its own over it. From then on those bytes never stand there again, so that whoever comes late
with the same claim sees that it is void. A claim left by a kill is a dead note like any other, and is claimed.

A note can be lost all the same: a folder is removed or moved, or a process is stopped for longer than others wait. So
whatever is written to a run's folder is preceded by a look whether the note there is still this process's
(`refuse_lost`). The note names its folder, so that one that was copied along with it bars nobody where it came to.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.store.errors import StoreError, UserError
from pipeline.store.format.digest import digest_bytes
from pipeline.store.format.document import dump_document, load_document
from pipeline.store.segments.alive import can_tell, describe_writer, is_dead

NOTE, KIND = ".at-work.json", "activation-writer"
BEAT, LOST = 15.0, 120.0  # seconds between two touches, and without one after which a process is taken for ended


_HELD: list[Note] = []  # of this process, and of those that it was forked from
_LENDING = threading.Lock()


class Note:
    """The note of this process in `folder`, which is there from `take` to `drop`. `runs`: whether folders in it are
    those of runs that it trains; `lent`: whether it is also that of the one who comes to train in `folder`, one at a
    time, in this process. `lost`: whether a beat found that it is no longer there."""

    def __init__(self, folder: Path, runs: bool = False, lent: bool = False) -> None:
        self.path, self._pid = folder / NOTE, os.getpid()
        self._about = {"kind": KIND, "mark": secrets.token_hex(8), "runs": runs, **describe_writer()}
        self._data, self._over, self._taken, self.lost = b"", threading.Event(), False, False
        self._folders = {folder.absolute(), folder.resolve()}
        self._lent = self._free = lent
        self._lender: Note | None = None

    def take(self, runs: Iterable[Path] = ()) -> None:
        """This process is at work in the folder, said once, and in the folders `runs`, where it will train. UserError
        where another one is, or the folder cannot be written."""
        where = self.path.parent
        try:
            if self._borrowed():
                return
            if self._taken:
                refuse_lost(where)
            else:
                self._data = dump_document({**self._about, "folder": _named(where)})
                self._placed(self.path)
                self._taken = True
                _HELD.append(self)
                threading.Thread(target=self._beat, name="at-work", daemon=True).start()
                for void in where.glob(f"{NOTE}.*"):  # claims of a note that is no longer there
                    void.unlink(missing_ok=True)
            # After our note is there: of two processes that come at once, one at least sees the other.
            self._look(runs)
        except OSError as error:
            raise UserError(f"{where} cannot be written ({error.strerror or error}); choose another --out") from None

    def _placed(self, path: Path) -> None:
        """Place this note at `path`, instead of a dead one. UserError where one lives there."""
        while True:
            with suppress(FileExistsError):
                return self._write(path)
            found = _Found.at(path, self.path.parent)
            if found is None:
                continue
            if not found.ended:
                raise UserError(found.told())
            claim = path.with_name(f"{NOTE}.{digest_bytes(path.name.encode() + found.data)}")
            self._placed(claim)
            try:
                if found.is_at(path):
                    claim.replace(path)
                    return
            except FileNotFoundError:  # void, and was taken away
                pass
            finally:
                claim.unlink(missing_ok=True)

    def _write(self, path: Path) -> None:
        """Write this note, new at `path`. FileExistsError where there is one."""
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            if os.write(handle, self._data) < len(self._data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle)  # other machines see it from here on
        except BaseException:
            os.close(handle)
            path.unlink(missing_ok=True)
            raise
        os.close(handle)

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with suppress(OSError):
                self.lost = bool(self.why_lost())
                if not self.lost:  # that of another, in its place, is not touched
                    os.utime(self.path)

    def of(self, folder: Path) -> bool:
        """Whether it is that of `folder`, or of one that this lies in."""
        names = {folder.absolute(), folder.resolve()}
        return not self._folders.isdisjoint(names.union(*(name.parents for name in names)))

    def why_lost(self) -> str:
        """Why nothing more may be written to the folder; "" where the note is there. OSError where nobody can tell."""
        folder = self.path.parent
        try:
            mine = _read(self.path)[0] == self._data
        except (FileNotFoundError, NotADirectoryError):
            return f"{folder} was removed or moved, or its {NOTE} deleted, while this process was at work there"
        except UserError:  # no file at all
            mine = False
        return "" if mine else f"another process has taken {folder} over"

    def _look(self, runs: Iterable[Path]) -> None:
        """UserError where another process trains what lies in the folder around, or lives in one of `runs`."""
        where = self.path.parent
        around = _Found.at(where.resolve().parent / NOTE, where)
        if around and around.writer.get("runs") and not around.ended and not around.ours:
            raise UserError(around.told(f", where {where} lies"))
        for run in runs:
            try:
                found = _Found.at(run / NOTE, where)
            except NotADirectoryError:
                raise UserError(f"{run} cannot be made (a file stands there); choose another --out") from None
            if found and not found.ended:
                raise UserError(found.told())

    def drop(self) -> None:
        """No longer at work there. In a fork of the process that made it, nothing: that one still is."""
        if os.getpid() != self._pid:
            return
        if self._lender:
            self._lender._free, self._lender = True, None
        if not self._taken:
            return
        self._over.set()
        self._taken = False
        _HELD.remove(self)
        with suppress(OSError):
            if not self.why_lost():
                self.path.unlink()

    def _borrowed(self) -> bool:
        """Whether a note that is lent in this process stands for this one, which is then not written."""
        with _LENDING:
            if not (self._lent or self._taken or self._lender):
                self._lender = next((note for note in held() if note._free and self._folders & note._folders), None)
                if self._lender:
                    self._lender._free = False
        if self._lender:
            refuse_lost(self.path.parent)
        return self._lender is not None


@contextmanager
def at_work(folder: Path, runs: Sequence[Path] = ()) -> Iterator[None]:
    """Within it this process is at work in `folder`, and in the folders `runs` in it, which are made. UserError where
    another one is in any of them."""
    with ExitStack() as leaving:
        for place in (folder, *dict.fromkeys(runs)):
            if place != folder and not place.exists():
                leaving.callback(_remove_empty, place)
                _make(place)
            note = Note(place, runs=bool(runs) and place == folder, lent=place != folder)
            leaving.callback(note.drop)
            note.take(runs if place == folder else ())
        yield


def held() -> list[Note]:
    """The notes of this process."""
    return [note for note in _HELD if note._pid == os.getpid()]


def refuse_lost(folder: Path) -> None:
    """UserError where this process was at work in `folder`, or in one that it lies in, and its note there is lost: what
    stands there may be another's."""
    for note in held():
        try:
            why = note.why_lost() if note.of(folder) else ""
        except OSError as error:
            why = f"{note.path} cannot be read ({error.strerror or error})"
        if why:
            raise UserError(f"{why}; nothing more is written there: give another --out")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror or error}); choose another --out") from None


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _named(folder: Path) -> dict[str, str]:
    """What tells a folder from a copy of it: after a move one of the two is as it was."""
    found = folder.stat()
    return {"path": str(folder.resolve()), "inode": f"{found.st_dev}:{found.st_ino}"}


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
        """Whether nobody is at work there by this note."""
        return is_dead(self.writer) or (self.copied if can_tell(self.writer) else self.silent > LOST)

    @property
    def copied(self) -> bool:
        """Whether it is a copy of the note in another folder of this machine."""
        told = self.writer.get("folder")
        return isinstance(told, dict) and all(told.get(k) != v for k, v in _named(self.path.parent).items())

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
    """The bytes of a note, and when it was touched, in ns. UserError for what is no file: a pipe would never end."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise UserError(f"{path} is no regular file (a link, a pipe or a folder): delete it, or give another --out")
    with path.open("rb") as file:
        return file.read(), os.fstat(file.fileno()).st_mtime_ns
