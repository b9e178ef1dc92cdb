"""Stores that are not on a disk: S3-compatible buckets, through fsspec; `store.files.mirror` is the same over HTTP(S).

Credentials come from where the protocol's own tools take them (AWS_* variables, ~/.aws, ~/.netrc), never from the URL,
so they reach no recipe, manifest, log or message. Objects appear whole or not at all, so a manifest written last seals
a segment here as it does on a disk. What never changes is kept in the local cache (`store.files.cache`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pipeline.store.errors import StoreError, TooLarge, UserError
from pipeline.store.files.cache import Cache
from pipeline.store.files.local import Files
from pipeline.store.format.digest import digest_bytes

T = TypeVar("T")
_TRIES = 6
CONNECT_SECONDS, ANSWER_SECONDS = 4.0, 20.0  # what one try waits for a server at most
STRANGER_SECONDS = 10.0  # after that a server that has never answered is not asked again
AT_ONCE = 32  # requests under way at most: an answer takes tens of milliseconds, and ten thousand are asked for
QUIET_SECONDS, REPEAT_SECONDS = 2.0, 10.0  # when a line first says what is waited for, and how often it is said again
_LOG = logging.getLogger(__name__)  # warnings reach stderr unless the program that uses us says otherwise
_SECRET = re.compile(r"(?i)((?:signature|credential|security-token|password|secret\w*)\W{1,3})[^\s&\"',]+")
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "FSSPEC_S3_KEY", "FSSPEC_S3_SECRET")


def redact(text: str) -> str:
    """`text` without anything that looks like a credential."""
    for name in _SECRETS:
        if len(os.environ.get(name, "")) > 3:
            text = text.replace(os.environ[name], "***")
    return _SECRET.sub(r"\1***", re.sub(r"://[^/\s@]*@", "://***@", text))


def check_url(url: str) -> str:
    """`url` without its last slashes. Raises UserError for one with credentials or a query in it."""
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"{parts.scheme}://…{parts.path}: a store's URL holds no credentials and no query, since URLs end up in "
            "recipes and logs: give them by AWS_* variables, ~/.aws or ~/.netrc"
        )
    if not parts.netloc:
        raise UserError(f"{url}: the bucket or host is missing")
    return url.rstrip("/")


class RemoteFiles(Files):
    """What an S3 bucket and an HTTP mirror share; `name` is relative to the store as everywhere."""

    local = False
    at_once = AT_ONCE
    fs: Any  # of fsspec

    def __init__(self, url: str, cache: Cache | None = None) -> None:
        self.root = check_url(url)
        self.cache = cache
        self.fetched = 0  # bytes that came from the other side
        self._answered, self._said = False, -REPEAT_SECONDS

    def fresh(self) -> Files:
        # A copy here says nothing of what has become of the file there. It is neither looked at nor written: it may be
        # the sound one, and a look at every byte would push out what is worth keeping.
        if self.cache is None:
            return self
        same = copy(self)  # with its connections
        same.cache = None
        return same

    def where(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")

    def path(self, name: str) -> Any:
        raise StoreError(f"{self.where(name)} is not a file on this machine")

    def read(self, name: str, limit: int) -> bytes:
        if self.cache is None or not is_immutable(name):
            return self._checked(name, limit)
        data = self.cache.get(self.where(name))
        if data is None:
            data = self._checked(name, limit)
            self.cache.put(self.where(name), data)
        if len(data) > limit:
            raise TooLarge(f"{self.where(name)} has {len(data)} bytes, more than the {limit} allowed: refused")
        return data

    def read_into(self, name: str, buffers: Sequence[Any]) -> str:
        total = sum(memoryview(b).nbytes for b in buffers)
        try:
            data = memoryview(self.read(name, total))
        except TooLarge:
            raise EOFError(f"has more than {total} bytes") from None
        if data.nbytes != total:
            raise EOFError(f"has {data.nbytes} bytes instead of {total}")
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            view[:] = data[: view.nbytes]
            data = data[view.nbytes :]
        return digest_bytes(*buffers)

    def forget(self, name: str) -> bool:
        if self.cache is not None:
            self.cache.forget(self.where(name))
        return True

    def _checked(self, name: str, limit: int) -> bytes:
        data = self._ask("reading", name, lambda: self._get(name, limit + 1))
        self.fetched += len(data)
        if len(data) > limit:
            raise TooLarge(f"{self.where(name)} has more than the {limit} bytes allowed: refused")
        return data

    def _get(self, name: str, most: int) -> bytes:
        raise NotImplementedError

    def _ask(self, doing: str, name: str, call: Callable[[], T]) -> T:
        """`call`, tried again where the network failed; every failure becomes one line without credentials."""
        began = time.monotonic()
        with self._saying(doing, name):
            for attempt in range(_TRIES):
                try:
                    result = call()
                    self._answered = True
                    return result
                except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                    self._answered = True
                    raise FileNotFoundError(self.where(name)) from None
                except UserError:
                    raise
                except Exception as error:
                    known = redact(" ".join(str(error).split())[:300]) or type(error).__name__
                    if isinstance(error, PermissionError) or _lacks_credentials(error):
                        raise StoreError(f"no permission while {doing} {self.where(name)}: {known}") from None
                    pause = 0.1 * 3**attempt
                    waited = time.monotonic() - began + pause
                    if attempt + 1 == _TRIES or (waited > STRANGER_SECONDS and not self._answered):
                        what = f"{known} while {doing} {self.where(name)} at {self.server}"
                        raise StoreError(f"{what}: check network and address") from None
                    time.sleep(pause)
        raise AssertionError

    @contextmanager
    def _saying(self, doing: str, name: str) -> Iterator[None]:
        """Says what is waited for, as a warning on the log, as long as the body takes."""
        waits = True

        def say() -> None:
            if not waits:
                return
            now = time.monotonic()
            if now - self._said >= REPEAT_SECONDS - 1:  # many requests wait at once
                self._said = now
                _LOG.warning("waiting for %s, %s %s", self.server, doing, self.where(name))
            loop.call_later(REPEAT_SECONDS, say)

        # On the loop that waits for the answers; a thread for each request took a fifth of this side's time.
        loop = self.fs.loop
        loop.call_soon_threadsafe(loop.call_later, QUIET_SECONDS, say)
        try:
            yield
        finally:
            waits = False

    @property
    def server(self) -> str:
        """Who answers, for people."""
        return urlsplit(self.root).netloc

    def make(self, folder: str) -> None:
        """Folders need no making here."""

    def sync(self, names: Iterable[str]) -> None:
        """What was written is durable already."""

    def free(self) -> int:
        return 1 << 62


class S3Files(RemoteFiles):
    """A store in a bucket: `s3://bucket/folder`. Needs the extra `s3`."""

    def __init__(self, url: str, cache: Cache | None = None) -> None:
        super().__init__(url, cache)
        try:
            import s3fs
        except ImportError:
            raise UserError("s3:// needs s3fs: pip install 'activation-pipeline[s3]'") from None
        # Checksums of our own are checked on both ends; those sent as trailers upset many compatible servers.
        config = {
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": ANSWER_SECONDS,
            "retries": {"total_max_attempts": 1},  # `_ask` tries again, and says so
            "max_pool_connections": AT_ONCE,
        }
        self.fs = s3fs.S3FileSystem(
            use_listings_cache=False, default_fill_cache=False, skip_instance_cache=True, config_kwargs=config
        )
        self.fs.retries = 1

    @property
    def server(self) -> str:
        return redact(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "S3")

    def size(self, name: str) -> int | None:
        try:
            info = self._ask("looking for", name, lambda: self.fs.info(self.where(name), refresh=True))
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def sizes(self, folder: str, names: Iterable[str]) -> dict[str, int | None]:
        found = self.listed(folder)
        return {name: found.get(name) for name in names}

    def listed(self, folder: str) -> dict[str, int]:
        return {name: int(entry["Size"]) for name, entry in self._listing(folder)}

    def modified(self, name: str) -> float:
        try:
            info = self._ask("looking for", name, lambda: self.fs.info(self.where(name), refresh=True))
        except FileNotFoundError:
            info = {"type": "directory"}
        if info["type"] == "file":
            return float(info["LastModified"].timestamp())
        return max((entry["LastModified"].timestamp() for _, entry in self._listing(name)), default=0.0)

    def names(self, folder: str) -> list[str]:
        return sorted({name.rstrip("/") for name, _ in self._listing(folder, "/")} - {""})

    def walk(self, folder: str) -> list[str]:
        return sorted(name for name, _ in self._listing(folder))

    def _listing(self, folder: str, delimiter: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        """Every file below `folder`, with what the server says of it; with a `delimiter`, names up to that. A page is
        a request of its own: a thousand files, of which no more than that is kept."""
        bucket, _, top = self.where(f"{folder}/").split("://", 1)[1].partition("/")
        top = f"{top}/" if top else ""
        token: dict[str, str] = {}
        while True:
            ask = partial(self.fs.call_s3, "list_objects_v2", Bucket=bucket, Prefix=top, Delimiter=delimiter, **token)
            try:
                page = self._ask("listing", folder, ask)
            except FileNotFoundError:
                return  # there is no such bucket
            found = [(entry["Key"], entry) for entry in page.get("Contents", ())]
            found += [(entry["Prefix"], entry) for entry in page.get("CommonPrefixes", ())]
            # Consoles make folders as files without content, whose names end so.
            yield from ((key[len(top) :], e) for key, e in found if key != top and (delimiter or key[-1] != "/"))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _get(self, name: str, most: int) -> bytes:
        try:
            return bytes(self.fs.cat_file(self.where(name), start=0, end=most))
        except OSError as error:
            # A range of nothing is an error to S3; asking for the size first would double the requests of all files.
            if _status(error) == 416 and self.size(name) == 0:
                return b""
            raise

    def write(self, name: str, buffers: Sequence[Any]) -> tuple[int, str]:
        data = b"".join(bytes(memoryview(b).cast("B")) for b in buffers)
        self.publish(name, data)
        return len(data), digest_bytes(data)

    def publish(self, name: str, data: bytes) -> None:
        """Put the object and make sure that it arrived: by its ETag where that is the MD5, else by reading it back."""
        for attempt in range(_TRIES):
            try:
                self._ask("writing", name, lambda: self.fs.pipe_file(self.where(name), data))
            except FileNotFoundError:
                bucket = urlsplit(self.root).netloc
                what = f"there is no bucket {bucket!r} at {self.server}: make it first, or check the name"
                raise StoreError(what) from None
            info = self._ask("looking for", name, lambda: self.fs.info(self.where(name), refresh=True))
            etag = str(info.get("ETag", "")).strip('"')
            if etag == hashlib.md5(data, usedforsecurity=False).hexdigest():
                return
            if self._ask("reading", name, lambda: self._get(name, len(data) + 1)) == data:
                return
            if attempt + 1 == _TRIES:
                raise StoreError(f"{self.where(name)} does not arrive as it was sent: check the network and the server")

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._ask("removing", name, lambda: self.fs.rm_file(self.where(name)))

    def remove_tree(self, folder: str, last: str = "") -> None:
        names = [name for name in self.walk(folder) if name != last]
        for name in [*names, *([last] if last else [])]:
            self.remove(f"{folder}/{name}")

    def move(self, source: str, target: str) -> None:
        for name in self.walk(source):
            old, new = self.where(f"{source}/{name}"), self.where(f"{target}/{name}")
            self._ask("moving", name, partial(self.fs.cp_file, old, new))
        self.remove_tree(source)


def _lacks_credentials(error: BaseException) -> bool:
    """Whether a client found no credentials to sign with, or only a part of them: botocore's types, which are not
    imported where no bucket is used."""
    lacking = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "NoAuthTokenError"}
    return any(kind.__name__ in lacking for kind in type(error).__mro__)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that a server answered with, of an error or of what caused it."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        error = error.__cause__
    return None


def is_immutable(name: str) -> bool:
    """Whether a file never changes once it is there, so that a copy of it is good for ever."""
    parts = name.split("/")
    if parts[0] == "weights":
        return parts[-1] != "manifest.json"
    return len(parts) > 3 and parts[0] == "spaces" and parts[2] in ("segments", "tasks") and parts[-1] != "writer.json"
