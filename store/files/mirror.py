"""Read-only mirrors: a store's folder as any web server hands it out that lists folders. See `store.files.remote`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from email.utils import parsedate_to_datetime
from html.parser import HTMLParser
from typing import Any
from urllib.parse import unquote, urljoin

from pipeline.store.errors import StoreError
from pipeline.store.files.cache import Cache
from pipeline.store.files.remote import ANSWER_SECONDS, CONNECT_SECONDS, RemoteFiles

_MAX_LISTING = 256 << 20


class HttpFiles(RemoteFiles):
    """A read-only mirror: a store's folder served by any web server that lists folders (nginx: `autoindex on`)."""

    searchable = False

    def __init__(self, url: str, cache: Cache | None = None) -> None:
        super().__init__(url, cache)
        import aiohttp
        import fsspec

        patience = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=ANSWER_SECONDS)
        self.fs = fsspec.filesystem("http", client_kwargs={"trust_env": True, "timeout": patience})

    def size(self, name: str) -> int | None:
        head = self._head(name)
        return None if head is None else int(head.get("Content-Length", 0))

    def sizes(self, folder: str, names: Iterable[str]) -> dict[str, int | None]:
        names = list(names)
        return dict(zip(names, self.each(lambda name: self.size(f"{folder}/{name}"), names), strict=True))

    def modified(self, name: str) -> float:
        head = self._head(name) or {}
        try:
            return parsedate_to_datetime(head["Last-Modified"]).timestamp()
        except (KeyError, ValueError):
            return 0.0

    def names(self, folder: str) -> list[str]:
        top = self.where(folder) + "/"

        def listing() -> list[str]:
            kind, page = self._fetch(top, _MAX_LISTING)
            if kind not in ("text/html", "application/xhtml+xml", ""):
                raise StoreError(f"{top} answers {kind}, not a listing: the server must list folders as HTML")
            return _links(page.decode("utf-8", "replace"))

        try:
            found = [urljoin(top, link) for link in self._ask("listing", folder, listing)]
        except FileNotFoundError:
            return []
        names = {unquote(url[len(top) :].rstrip("/")) for url in found if url.startswith(top)}
        return sorted(n for n in names if n and not set(n) & set("/?#") and n not in (".", ".."))

    def walk(self, folder: str) -> list[str]:
        raise StoreError(f"{self.where(folder)}: an HTTP mirror cannot be searched; pull it and look at the copy")

    def _head(self, name: str) -> dict[str, str] | None:
        async def head() -> dict[str, str]:
            session = await self.fs.set_session()
            async with session.head(self.where(name), allow_redirects=False) as answer:
                self._judge(answer)
                return dict(answer.headers)

        try:
            return self._ask("looking for", name, lambda: self._run(head))
        except FileNotFoundError:
            return None

    def _get(self, name: str, most: int) -> bytes:
        return self._fetch(self.where(name), most)[1]

    def _fetch(self, url: str, most: int) -> tuple[str, bytes]:
        """Media type and content of `url`, at most `most` bytes of it."""

        async def get() -> tuple[str, bytes]:
            session = await self.fs.set_session()
            headers = {"Accept-Encoding": "identity"}
            async with session.get(url, headers=headers, allow_redirects=False) as answer:
                self._judge(answer)
                # Never more than was asked for, whatever the server says or sends.
                parts, left = [], most
                async for part in answer.content.iter_chunked(1 << 20):
                    parts.append(part[:left])
                    left -= len(parts[-1])
                    if not left:
                        break
                else:
                    size = answer.content_length
                    if size is not None and size != most - left:
                        raise OSError(f"the answer broke off after {most - left} of {size} bytes")
                kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
                return kind, b"".join(parts)

        found: tuple[str, bytes] = self._run(get)
        return found

    def _run(self, call: Callable[[], Any]) -> Any:
        from fsspec.asyn import sync

        return sync(self.fs.loop, asyncio.wait_for, call(), 300)

    @staticmethod
    def _judge(answer: Any) -> None:
        if answer.status in (404, 410) or 300 <= answer.status < 400:
            raise FileNotFoundError
        if answer.status in (401, 403):
            raise PermissionError(f"the server answers {answer.status}")
        if answer.status >= 400:
            raise OSError(f"the server answers {answer.status}")

    def _refuse(self, *args: Any, **options: Any) -> Any:
        raise StoreError(f"{self.root} is a read-only mirror: write to the store it is a mirror of, or pull it")

    write = publish = remove = remove_tree = move = make = _refuse


class _Page(HTMLParser):
    """The links of an HTML page, and whether it was `opened` and `closed` as a document."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.opened = self.closed = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.opened |= tag == "html"
        self.links += [value for name, value in attributes if tag == "a" and name == "href" and value]

    def handle_endtag(self, tag: str) -> None:
        self.closed |= tag == "html"


def _links(text: str) -> list[str]:
    """Where the links of a listing lead. Raises OSError for a page that was cut short: nothing else would tell it from
    the listing of a folder with fewer files."""
    page = _Page()
    page.feed(text)
    if page.opened and not page.closed:
        raise OSError(f"the listing broke off after {len(text)} characters")
    return page.links
