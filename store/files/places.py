"""Where a store can live: a folder, an S3 bucket (`s3://`), a read-only mirror (`http://`, `https://`)."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.store.errors import UserError
from pipeline.store.files.local import Files
from pipeline.store.sizes import parse_size

CACHE_BYTES = 20 * 10**9


def is_remote(where: str | Path) -> bool:
    """Whether `where` is a URL."""
    return "://" in str(where)


def absolute(where: str | Path) -> str:
    """The same place whatever the working directory; a URL stays as it is."""
    return str(where) if is_remote(where) else os.path.abspath(where)  # noqa: PTH100 (links stay as they are)


def open_files(where: str | Path) -> Files:
    """Access to the files of the store at `where`, be it there or not. Raises UserError for an unknown protocol."""
    if not is_remote(where):
        return Files(where)
    return _remote(str(where), str(cache_folder()), cache_bytes(), os.getpid())


def cache_folder() -> Path:
    """Where what can be fetched or derived again is kept: $PIPELINE_CACHE, else `activation-pipeline` in
    $XDG_CACHE_HOME, else in ~/.cache."""
    if mine := os.environ.get("PIPELINE_CACHE"):
        return Path(mine)
    common = os.environ.get("XDG_CACHE_HOME", "")
    # A relative one is to be ignored, says the specification.
    return (Path(common) if Path(common).is_absolute() else Path.home() / ".cache") / "activation-pipeline"


def cache_bytes() -> int:
    """$PIPELINE_CACHE_SIZE ("50GB"; 0 is off), else 20 GB."""
    text = os.environ.get("PIPELINE_CACHE_SIZE", "")
    return parse_size(text, "PIPELINE_CACHE_SIZE") if text else CACHE_BYTES


@lru_cache(maxsize=64)
def _remote(where: str, folder: str, limit: int, process: int) -> Files:
    """One for each place, so that connections are shared; `process`: a fork must not share them."""
    from pipeline.store.files.cache import Cache
    from pipeline.store.files.mirror import HttpFiles
    from pipeline.store.files.remote import S3Files

    kinds = {"s3": S3Files, "http": HttpFiles, "https": HttpFiles}
    scheme = urlsplit(where).scheme
    if scheme not in kinds:
        raise UserError(f"{scheme}://: a store is a folder, s3://BUCKET/FOLDER, or http(s)://HOST/FOLDER (read-only)")
    return kinds[scheme](where, Cache(folder, limit) if limit else None)
