"""File access: the one place that touches the disk; `store.files.remote` does the same for buckets and web servers.

Paths are relative to the store. A path that leaves the store through a symbolic link is refused.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pipeline.store.errors import StoreError, TooLarge
from pipeline.store.format.digest import Digest, digest_bytes
from pipeline.store.format.names import temporary_name

S = TypeVar("S")
T = TypeVar("T")
WAITED, TRIED = 5e-4, 64  # seconds that half of so many are waited for, from which on more are asked side by side
_PIECE = 512 << 10  # read and digested at a time: the digest finds it in the processor's cache


class Files:
    """A store's folder on a local or mounted disk. `root` is absolute.

    Modes follow the umask; in a folder that a group shares (setgid and writable for the group, as `pipeline store
    share` makes it) the group may read and write everything.
    """

    local = True
    searchable = True  # whether `walk` works
    at_once = 16  # questions that are asked side by side: a network disk takes time for each

    def __init__(self, root: str | Path) -> None:
        self.root = os.path.realpath(root)
        try:
            mode = Path(self.root).stat().st_mode
        except OSError:
            mode = 0
        self.shared = bool(mode & stat.S_ISGID and mode & stat.S_IWGRP)

    def where(self, name: str) -> str:
        """How people call the place of `name`; "" is the store itself."""
        return f"{self.root}/{name}".rstrip("/")

    def path(self, name: str) -> Path:
        """The absolute path of `name`; "" is the store itself. Raises StoreError if a symbolic link leads out of it."""
        full = f"{self.root}/{name}".rstrip("/")
        real = os.path.realpath(full)
        if real != full and not real.startswith(self.root + os.sep):
            raise StoreError(
                f"{full} is a symbolic link out of the store: refused; copy what it points to into the store"
            )
        return Path(real)

    def size(self, name: str) -> int | None:
        """Bytes of the file, None if there is none."""
        with self._reading(name):
            try:
                return self.path(name).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

    def sizes(self, folder: str, names: Iterable[str]) -> dict[str, int | None]:
        """`size` of many files below `folder` at once."""
        homes: dict[str, str] = {}

        def home(parent: str) -> str:
            """A folder below `folder`; that it is no link is seen once for all files in it."""
            if parent not in homes:
                upper, _, last = parent.rpartition("/")
                full = f"{home(upper)}/{last}" if parent else ""
                whole = f"{folder}/{parent}".rstrip("/")
                homes[parent] = str(self.path(whole)) if not parent or Path(full).is_symlink() else full
            return homes[parent]

        def size(name: str) -> int | None:
            parent, _, last = name.rpartition("/")
            with self._reading(f"{folder}/{name}"):
                try:
                    found = os.lstat(f"{home(parent)}/{last}")
                except (FileNotFoundError, NotADirectoryError):
                    return None
            return self.size(f"{folder}/{name}") if stat.S_ISLNK(found.st_mode) else found.st_size

        return {name: size(name) for name in names}

    def each(self, ask: Callable[[S], T], of: Sequence[S]) -> list[T]:
        """`ask` of each, in order; side by side as soon as answers are waited for, as from a network disk. Where they
        are at hand, threads would wait for each other instead, at two to three times the processor time."""
        found: list[T] = []
        waited = 0.0 if self.local else 1.0
        while len(found) < len(of) and waited < WAITED:
            waits = []
            for one in of[len(found) : len(found) + TRIED]:
                begun = time.perf_counter() - time.thread_time()
                found.append(ask(one))
                waits.append(time.perf_counter() - time.thread_time() - begun)
            waited = sorted(waits)[len(waits) // 2]  # a busy machine lets a few of them wait for long
        if len(found) < len(of):
            with ThreadPoolExecutor(self.at_once) as pool:
                found += pool.map(ask, of[len(found) :])
        return found

    def listed(self, folder: str) -> dict[str, int] | None:
        """Every file below `folder` → its bytes, where one question tells them all, else None."""
        return None

    def fresh(self) -> Files:
        """The same files, each byte of which is read where the store is, from no cache."""
        return self

    def forget(self, name: str) -> bool:
        """Drop any copy of `name` kept elsewhere; whether reading it again may give other bytes."""
        return False

    def modified(self, name: str) -> float:
        """Time of the last change of a file or folder, in seconds since the epoch."""
        return self.path(name).stat().st_mtime

    def names(self, folder: str) -> list[str]:
        """Sorted names in `folder`; none if there is no such folder."""
        with self._reading(folder):
            try:
                return sorted(entry.name for entry in self.path(folder).iterdir())
            except (FileNotFoundError, NotADirectoryError):
                return []

    def walk(self, folder: str) -> list[str]:
        """Every file below `folder`, relative to it, sorted. Links to folders are listed, not followed."""
        top = self.path(folder)
        found = [entry for entry in top.rglob("*") if entry.is_symlink() or not entry.is_dir()]
        return sorted(entry.relative_to(top).as_posix() for entry in found)

    def read(self, name: str, limit: int) -> bytes:
        """The whole file. Raises FileNotFoundError, or StoreError if it is longer than `limit` bytes."""
        with self._reading(name), self._open(name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise TooLarge(f"{self.path(name)} has {size} bytes, more than the {limit} allowed: refused")
            return file.read(size)

    def read_into(self, name: str, buffers: Sequence[Any]) -> str:
        """Fill `buffers` with the file, one after the other; returns the digest of what was read.

        Raises FileNotFoundError, or EOFError if the file is not exactly as long as they are.
        """
        total = sum(memoryview(b).nbytes for b in buffers)
        digest = Digest()
        with self._reading(name), self._open(name, 0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != total:
                raise EOFError(f"has {size} bytes instead of {total}")
            for buffer in buffers:
                left = memoryview(buffer).cast("B")
                while left.nbytes:
                    count = file.readinto(left[:_PIECE])
                    if not count:
                        raise EOFError("became shorter while it was read")
                    digest.update(left[:count])
                    left = left[count:]
        return digest.hexdigest()

    def will_need(self, names: Iterable[str]) -> None:
        """Let the disk begin to read files that are read next: it is busy while what came before is checked."""
        if not hasattr(os, "posix_fadvise"):
            return
        for name in names:
            # Nothing is taken from the file here, so that a link is not looked into; reading it is refused later.
            with suppress(OSError):
                descriptor = os.open(f"{self.root}/{name}", os.O_RDONLY | os.O_NONBLOCK)  # a pipe is not waited for
                try:
                    if not _in_memory(descriptor):
                        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)

    def _open(self, name: str, buffering: int = -1) -> Any:
        """The file, for reading. Raises StoreError for what is no regular file; a pipe would be waited for."""
        path = self.path(name)
        if not stat.S_ISREG(path.stat().st_mode):
            raise StoreError(f"{path} is not a regular file: refused")
        return path.open("rb", buffering)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Turns what a disk may answer to a reader (no permission, I/O error) into one line for the user."""
        try:
            yield
        except FileNotFoundError:
            raise
        except MemoryError:
            raise StoreError(f"{self.root}/{name} does not fit in memory: refused") from None
        except OSError as error:
            raise explain(error, "reading", f"{self.root}/{name}") from error

    def make(self, folder: str) -> None:
        """Make `folder` and its parents."""
        if not self.shared:
            self.path(folder).mkdir(parents=True, exist_ok=True)
            return
        parts = folder.split("/")
        for depth in range(1, len(parts) + 1):
            path = self.path("/".join(parts[:depth]))
            try:
                path.mkdir()
            except FileExistsError:
                continue
            path.chmod(stat.S_IMODE(path.stat().st_mode) | stat.S_IRWXG | stat.S_ISGID)

    def write(self, name: str, buffers: Sequence[Any]) -> tuple[int, str]:
        """Write a new file, not yet durable. Returns its size and xxh3-128."""
        size = 0
        with self.path(name).open("xb", buffering=0) as file:
            if self.shared:
                os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode) | stat.S_IRGRP | stat.S_IWGRP)
            for buffer in buffers:
                left = memoryview(buffer).cast("B")
                size += left.nbytes
                while left.nbytes:
                    left = left[file.write(left) :]
        return size, digest_bytes(*buffers)

    def sync(self, names: Iterable[str]) -> None:
        """Make files and folders durable."""
        for name in names:
            descriptor = os.open(self.path(name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def publish(self, name: str, data: bytes) -> None:
        """Write `name` atomically and durably: readers see the whole file or none."""
        temporary = temporary_name(name)
        try:
            self.write(temporary, [data])
            self.sync([temporary])
            self.path(temporary).replace(self.path(name))
        except BaseException:
            self.remove(temporary)
            raise
        self.sync([name.rpartition("/")[0]])

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        Path(f"{self.root}/{name}").unlink(missing_ok=True)

    def remove_tree(self, folder: str, last: str = "") -> None:
        """Remove `folder` with all in it; the file `last` goes after all else, so that a kill can be made good."""
        top = self.path(folder)
        for name in self.walk(folder):
            if name != last:
                self.remove(f"{folder}/{name}")
        for inside in top.glob("*/") if last else ():
            shutil.rmtree(inside, ignore_errors=True)
        shutil.rmtree(top, ignore_errors=True)

    def move(self, source: str, target: str) -> None:
        """Rename a file or folder. Raises FileExistsError if `target` is a file or a folder that is not empty."""
        try:
            if self.path(target).is_file():
                raise FileExistsError(errno.EEXIST, "is there already", target)
            self.path(source).rename(self.path(target))
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise FileExistsError(errno.EEXIST, "is there already", target) from None
            raise
        self.sync({name.rsplit("/", 1)[0] if "/" in name else "" for name in (source, target)})

    def free(self) -> int:
        """Bytes free on the store's disk for this user."""
        return shutil.disk_usage(self.root).free


def explain(
    error: OSError, doing: str, where: str, needed: int = 0, free: Callable[[], int] | None = None
) -> StoreError:
    """A failed file operation as one line for the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        left = f", {free() / 1e6:.1f} MB are free" if free else ""
        amount = f" ({needed / 1e6:.1f} MB needed{left})" if needed else ""
        return StoreError(
            f"disk full while {doing} {where}{amount}: free some space or choose another store; "
            "everything sealed before is safe"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StoreError(f"no permission while {doing} {where}: {error.strerror}")
    return StoreError(f"{error.strerror or error} while {doing} {where}")


def _in_memory(descriptor: int) -> bool:
    """Whether a file seems to be in the page cache, by its first byte, the one in the middle and the last: advising the
    system about one that is takes longer than looking."""
    try:
        size = os.fstat(descriptor).st_size
        return all(os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT) for at in (0, size // 2, max(0, size - 1)))
    except (OSError, AttributeError):  # it would have to wait, or the system cannot say
        return False
