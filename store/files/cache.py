"""`Cache`: copies of remote files on a local disk, at most so many bytes of them, the least recently used go first.

Every copy carries its own digest and appears by a rename: a kill, a full disk or a flipped bit costs a copy, never a
wrong byte. Any number of processes may share the folder without a lock; each counts what it adds and looks at the whole
folder before it removes anything.
"""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from threading import Lock

from pipeline.store.format.digest import digest_bytes


def keep_file(path: Path, *pieces: bytes) -> bool:
    """Write `pieces` to `path`, whole or not at all; False where the disk does not take it, which is no error."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with part.open("wb") as file:
            for piece in pieces:
                file.write(piece)
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        return False
    return True


class Cache:
    """Copies in `folder`, made when first needed, of at most `limit` bytes together."""

    def __init__(self, folder: str | Path, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self.hits = self.misses = 0
        self._added, self._total = 0, -1
        self._lock = Lock()

    def get(self, key: str) -> bytes | None:
        """The copy of `key`, marked as used; None if there is none or it is damaged."""
        if self._total < 0:
            with self._lock:
                if self._total < 0:
                    self._evict()  # The limit may be lower than it was for those who filled it.
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            self.misses += 1
            return None
        body = memoryview(data)[32:]
        if digest_bytes(body).encode() != data[:32]:
            self.forget(key)
            self.misses += 1
            return None
        self.hits += 1
        with suppress(OSError):  # Removed by another process just now, or a cache that may only be read.
            os.utime(path)
        return bytes(body)

    def put(self, key: str, data: bytes) -> None:
        """Keep a copy, unless it is larger than the whole cache; a disk that does not take it is no error."""
        if len(data) + 32 > self.limit:
            return
        if not keep_file(self._path(key), digest_bytes(data).encode(), data):
            return
        with self._lock:
            if self._total < 0:
                self._total = sum(size for _, size, _ in self._entries())
            else:
                self._total += len(data) + 32
            self._added += len(data) + 32
            # Others add too: look again now and then.
            if self._total > self.limit or self._added > self.limit // 8:
                self._evict()

    def forget(self, key: str) -> None:
        """Remove the copy of `key`."""
        with suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    @property
    def nbytes(self) -> int:
        """Bytes of all copies now."""
        return sum(size for _, size, _ in self._entries())

    def _path(self, key: str) -> Path:
        name = digest_bytes(key.encode())
        return self.folder / name[:2] / name

    def _entries(self) -> list[tuple[float, int, str]]:
        """(last use, bytes, path) of every copy."""
        found = []
        try:
            folders = [entry.path for entry in os.scandir(self.folder) if len(entry.name) == 2]
        except OSError:
            return []
        for folder in folders:
            try:
                for entry in os.scandir(folder):
                    info = entry.stat(follow_symlinks=False)
                    found.append((info.st_mtime, info.st_size, entry.path))
            except OSError:
                continue
        return found

    def _evict(self) -> None:
        entries = sorted(self._entries())
        total, stale = sum(size for _, size, _ in entries), time.time() - 3600
        for used, size, path in entries:
            if total <= self.limit and not (path.endswith(".part") and used < stale):
                continue
            if path.endswith(".part") and used >= stale:
                continue  # Another process is writing it.
            try:
                Path(path).unlink(missing_ok=True)
                total -= size
            except OSError:
                continue
        self._total, self._added = total, 0
