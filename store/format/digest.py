"""Digests: xxh3-128 of bytes and of canonical JSON.

xxh3-128 is not cryptographic: it finds damage and names content, it does not authenticate whoever wrote it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys, no spaces and ASCII only: one text for one value.

    Raises TypeError or ValueError for what JSON cannot hold (NaN and infinity included).
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


Digest = xxhash.xxh3_128  # `update` with one buffer after the other, then `hexdigest`


def digest_bytes(*parts: Any) -> str:
    """xxh3-128 of the concatenated buffers, 32 lower hex characters."""
    state = Digest()
    for part in parts:
        state.update(part)
    return str(state.hexdigest())


def digest_file(path: Path) -> str:
    """`digest_bytes` of a file, a piece at a time: videos are larger than what is to stand in memory."""
    state = Digest()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            state.update(part)
    return str(state.hexdigest())


def digest_json(value: Any) -> str:
    """xxh3-128 of the canonical JSON of `value`; the id of a feature space is this over its identity."""
    return digest_bytes(canonical_json(value))
