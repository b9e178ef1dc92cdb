"""JSON documents that carry their own digest: `{"xxh3":"<digest of the rest>",...}`.

`store.json`, `space.json` and every `manifest.json` are such documents. Any JSON reader opens them; ours refuses one
in which any byte differs from what was written, since a flipped digit in a sample key would hand out a wrong state.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.store.errors import StoreError
from pipeline.store.format.digest import canonical_json, digest_bytes
from pipeline.store.format.names import FORMAT

_HEAD = b'{"xxh3":"'
_TAIL = b'",'
_BODY = len(_HEAD) + 32 + len(_TAIL)


def dump_document(document: dict[str, Any]) -> bytes:
    """`document` as bytes with its digest in front. Raises TypeError or ValueError for what JSON cannot hold."""
    body = canonical_json(document)
    return _HEAD + digest_bytes(body).encode() + _TAIL + body[1:]


def load_document(
    data: bytes, where: str | Path, kind: str, parse: Callable[[bytes, str | Path], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The document `data`, whose `kind` must be `kind`. `parse`: in place of `parse_json`.

    Raises StoreError naming `where`: damaged, of another kind, or of a newer format than this version reads.
    """
    body = b"{" + data[_BODY:]
    whole = data[: len(_HEAD)] == _HEAD and data[_BODY - len(_TAIL) : _BODY] == _TAIL
    whole = whole and data[len(_HEAD) : len(_HEAD) + 32] == digest_bytes(body).encode()
    document = (parse or parse_json)(body if whole else data, where)
    version = document.get("format")
    # A newer format may well seal its documents differently: say "newer" rather than "damaged".
    if type(version) is int and version > FORMAT and document.get("kind") == kind:
        raise StoreError(f"{where} is of format {version}, this version reads up to {FORMAT}: install a newer version")
    if document.get("kind") != kind:
        raise StoreError(f"{where} is not an {kind.replace('-', ' ')}")
    if not whole:
        raise StoreError(f"{where} is damaged: its digest does not match; restore it from another copy or delete it")
    return document


def parse_json(data: bytes, where: str | Path) -> dict[str, Any]:
    """A JSON object from untrusted bytes. Raises StoreError for anything else, however deep or long."""

    def refuse(text: str) -> Any:
        raise ValueError(text)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # Of a name that occurs twice one reader takes the first and another the last.
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        value = json.loads(data, parse_constant=refuse, object_pairs_hook=once)
    except (ValueError, RecursionError, MemoryError) as error:
        raise StoreError(f"{where} is not readable JSON: the file is damaged or foreign") from error
    if not isinstance(value, dict):
        raise StoreError(f"{where} is not a JSON object: the file is damaged or foreign")
    return value
