"""Task tables of format 1, read only: one gzipped file of JSON lines, the header first, then `[key, label, [texts…]]` a
row. Everything above sees what format 2 would say (see `header_of`)."""

from __future__ import annotations

import gzip
import io
import json
import math
import zlib
from typing import Any

from pipeline.store.format.digest import digest_json
from pipeline.store.format.document import parse_json
from pipeline.store.format.names import MAX_JSON, MAX_UNPACKED, MAX_UNPACKED_RATIO, UNPACKED_SLACK, are_keys

_TARGETS = {"classification": "class", "regression": "number"}


def read_header(data: bytes, where: str) -> dict[str, Any]:
    """The header of the table `data`. Raises StoreError or ValueError for one that cannot be read."""
    return header_of(parse_json(_unpacked(data, MAX_JSON, first=True), where))


def read_rows(data: bytes, rows: int, where: str) -> tuple[dict[str, Any], list[str], list[Any], list[list[str]]]:
    """Header, keys, labels and texts of the table `data` of `rows` rows. Raises StoreError or ValueError."""
    limit = min(MAX_UNPACKED_RATIO * len(data) + UNPACKED_SLACK, MAX_UNPACKED)
    plain = _unpacked(data, limit + 1)
    if len(plain) > limit:
        raise ValueError(f"it unpacks to more than {limit} bytes")
    first, *lines = plain.split(b"\n")[:-1] or [b""]
    header = header_of(parse_json(first, where))
    if len(lines) != rows:
        raise ValueError("its header does not match its rows")
    try:
        found = json.loads(b"[" + b",".join(lines) + b"]")
        keys, labels, texts = ([row[i] for row in found] for i in range(3))
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise ValueError("a row is malformed") from error
    sound = len(found) == rows and are_keys(keys) and all(map(_is_label, labels))
    if not sound or not all(isinstance(t, list) and all(isinstance(s, str) for s in t) for t in texts):
        raise ValueError("a row is malformed")
    return header, keys, labels, texts


def header_of(header: dict[str, Any]) -> dict[str, Any]:
    """A header of format 1 in the words of format 2: what `spec` called `kind` and `targets` are `target` and `texts`,
    and the version, then the digest of spec and provenance, is said."""
    version = digest_json([header.get("spec"), header.get("provenance")])
    spec = header.get("spec")
    if isinstance(spec, dict):
        spec = dict(spec)
        if "kind" in spec:
            kind = spec.pop("kind")
            spec["target"] = _TARGETS.get(kind, kind) if isinstance(kind, str) else kind
        if "targets" in spec:
            spec["texts"] = spec.pop("targets")
        header = {**header, "spec": spec}
    return {**header, "version": version} if "spec" in header else header


def _unpacked(data: bytes, limit: int, first: bool = False) -> bytes:
    """At most `limit` bytes, or only the first line. Raises ValueError."""
    try:
        file = gzip.GzipFile(fileobj=io.BytesIO(data))
        return file.readline(limit) if first else file.read(limit)
    except (OSError, EOFError, ValueError, MemoryError, zlib.error) as error:
        raise ValueError(str(error) or "it does not fit in memory") from error


def _is_label(value: object) -> bool:
    """Whether it is a class index, a finite number, or None."""
    if type(value) is int:
        return abs(value) < 1 << 63
    return value is None or (type(value) is float and math.isfinite(value))
