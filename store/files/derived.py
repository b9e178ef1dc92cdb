"""What is derived from a store's files and costs time to make again: manifests as arrays, headers of large tables.

It is kept in the cache folder of the user's machine, is no part of the store, and is found by what it was made from, so
that a file which was rewritten or damaged never hides behind it: a manifest by the digest of the bytes that were read
just now, a table's header by the place, size and time of the table. Where the cache is off nothing is kept.
"""

from __future__ import annotations

import json
import os
import time
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.store.files.cache import Cache
from pipeline.store.files.local import Files
from pipeline.store.files.places import cache_bytes, cache_folder
from pipeline.store.format.digest import canonical_json
from pipeline.store.format.keys import Keys
from pipeline.store.format.manifest import Manifest, StateInfo, load_manifest

WORTH = 16 << 10  # bytes of a file; a smaller one is read as fast as what was derived from it
SETTLED = 2.0  # seconds; the times of some file systems are no finer
_MADE = 1  # counts up when what is derived changes


def cache() -> Cache | None:
    """The cache folder of this machine; None where it is off."""
    return _cache(os.getpid(), *map(os.environ.get, ("PIPELINE_CACHE", "XDG_CACHE_HOME", "PIPELINE_CACHE_SIZE")))


@lru_cache(maxsize=8)
def _cache(process: int, *settings: str | None) -> Cache | None:
    """Asked for once for each segment, so that the settings are read once; `process`: each counts for itself."""
    limit = cache_bytes()
    return Cache(cache_folder(), limit) if limit else None


def manifest_of(data: bytes, digest: str, where: str, space: str, segment: str) -> Manifest:
    """`load_manifest` of `data`, whose xxh3-128 is `digest`; of the same bytes it is parsed and checked once."""
    known = cache() if len(data) >= WORTH else None
    name = f"manifest {_MADE} {space} {segment} {len(data)} {digest}"
    if known is not None and (packed := known.get(name)) is not None:
        return _unpacked(packed)
    manifest = load_manifest(data, where, space, segment)
    if known is not None:
        known.put(name, _packed(manifest))
    return manifest


def header_name(files: Files, path: str, size: int) -> str | None:
    """What the header of the table at `path` is kept under; None where it is not worth it, or its time is not known or
    so near that another change would bear the same."""
    changed = files.modified(path) if size >= WORTH else 0.0
    settled = 0 < changed < time.time() - SETTLED
    return f"header {_MADE} {files.where(path)} {size} {changed!r}" if settled else None


def _packed(manifest: Manifest) -> bytes:
    arrays = {"high": manifest.keys.high, "low": manifest.keys.low}
    arrays |= {f"lengths {stream}": lengths for stream, lengths in manifest.lengths.items()}
    about: dict[str, Any] = {
        "id": manifest.id,
        "space": manifest.space,
        "base": manifest.base,
        "columns": manifest.columns,
        "states": {name: [s.width, s.format, s.scale] for name, s in manifest.states.items()},
        "files": [[name, *entry] for name, entry in manifest.files.items()],
        "provenance": manifest.provenance,
        "created": manifest.created,
        "arrays": {name: [a.dtype.str, a.nbytes] for name, a in arrays.items()},
        "order": list(arrays),
    }
    head = canonical_json(about)
    return b"".join([len(head).to_bytes(8, "little"), head, *(a.tobytes() for a in arrays.values())])


def _unpacked(packed: bytes) -> Manifest:
    start = 8 + int.from_bytes(packed[:8], "little")
    about = json.loads(packed[8:start])
    arrays = {}
    for name in about["order"]:
        dtype, size = about["arrays"][name]
        arrays[name] = np.frombuffer(packed[start : start + size], dtype)
        start += size
    return Manifest(
        about["id"],
        about["space"],
        about["base"],
        Keys(arrays["high"], arrays["low"]),
        {name.removeprefix("lengths "): a for name, a in arrays.items() if name.startswith("lengths ")},
        {name: StateInfo(*info) for name, info in about["states"].items()},
        tuple(about["columns"]),
        {name: (size, digest) for name, size, digest in about["files"]},
        about["provenance"],
        about["created"],
    )
