"""`Manifest`: what a sealed segment holds. Written last, so that its presence is the seal."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.store.errors import StoreError
from pipeline.store.format.document import dump_document, load_document, parse_json
from pipeline.store.format.formats import FORMATS
from pipeline.store.format.keys import Keys
from pipeline.store.format.names import (
    FORMAT,
    MAX_FILES,
    MAX_LENGTH,
    MAX_NAMES,
    MAX_STREAMS,
    MAX_WIDTH,
    is_key,
    is_relative,
    is_segment,
    is_state,
    is_stream,
    stream_of,
)

KIND = "activation-segment"
_BEFORE_KEYS = b'"samples":{"keys":['


@dataclass(frozen=True)
class StateInfo:
    """How one state is stored: `width` channels, number `format`, and whether `<state>.scale` is there."""

    width: int
    format: str
    scale: bool

    @property
    def row_bytes(self) -> int:
        value = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}[self.format]
        return self.width * value + (0 if not self.scale else 4 if self.format == "int8" else 1)


@dataclass(frozen=True)
class Manifest:
    """`lengths`: stream → (n,) int64, one for each of `keys`. `files`: path below the segment → (size, xxh3-128).

    `base` is the segment whose samples a supplement repeats, in order, with further states; None for a base segment.
    """

    id: str
    space: str
    base: str | None
    keys: Keys
    lengths: dict[str, np.ndarray]
    states: dict[str, StateInfo]
    columns: tuple[str, ...]
    files: dict[str, tuple[int, str]]
    provenance: dict[str, Any] = field(default_factory=dict)
    created: str = ""

    def dump(self) -> bytes:
        return dump_document(
            {
                "kind": KIND,
                "format": FORMAT,
                "id": self.id,
                "space": self.space,
                "base": self.base,
                "samples": {"keys": list(self.keys), "lengths": {k: v.tolist() for k, v in self.lengths.items()}},
                "states": {
                    name: {"stream": stream_of(name), "width": s.width, "format": s.format, "scale": s.scale}
                    for name, s in self.states.items()
                },
                "columns": list(self.columns),
                "files": [{"name": n, "size": s, "xxh3": d} for n, (s, d) in sorted(self.files.items())],
                "provenance": self.provenance,
                "created": self.created,
            }
        )


def load_manifest(data: bytes, where: str | Path, space: str, segment: str) -> Manifest:
    """The manifest of `segment` in `space`, every field checked before anything is allocated from it.

    Raises StoreError naming `where` and the field that is wrong.
    """
    document = load_document(data, where, KIND, _parse)

    def need(condition: object, what: str) -> None:
        if not condition:
            raise StoreError(
                f"{where} is damaged or foreign: {what}; restore it from another copy or delete the segment"
            )

    base = document.get("base")
    need(document.get("id") == segment, f"its id is not {segment}")
    need(document.get("space") == space, f"it belongs to another feature space than {space}")
    need(base is None or (is_segment(base) and base != segment), "base is not a segment id")

    samples: Any = document.get("samples")
    need(isinstance(samples, dict), "samples is missing")
    keys: Any = samples.get("keys")
    listed: Any = samples.get("lengths")
    try:
        known = Keys.of(keys if isinstance(keys, list | Keys) else [""])
    except ValueError:
        need(False, "samples.keys are not xxh3-128 digests")
    need(known.distinct() == len(known), "a sample key occurs twice")
    need(isinstance(listed, dict) and all(is_stream(s) for s in listed), "samples.lengths is malformed")
    need(len(listed) <= MAX_STREAMS, f"it has more than {MAX_STREAMS} streams")
    lengths = {}
    for stream, values in listed.items():
        sound = isinstance(values, list) and len(values) == len(keys) and set(map(type, values)) <= {int}
        sound = sound and min(values, default=0) >= 0 and max(values, default=0) < MAX_LENGTH
        need(sound, f"samples.lengths.{stream} is malformed")
        lengths[stream] = np.array(values, np.int64)

    states = {}
    listed = document.get("states")
    need(isinstance(listed, dict), "states is missing")
    for name, info in listed.items():
        sound = is_state(name) and stream_of(name) in lengths and isinstance(info, dict)
        sound = sound and type(info.get("width")) is int and 1 <= info["width"] <= MAX_WIDTH
        sound = sound and info.get("format") in FORMATS and type(info.get("scale")) is bool
        need(sound, f"states[{name[:80]!r}] is malformed")
        states[name] = StateInfo(info["width"], info["format"], info["scale"])
    columns: Any = document.get("columns")
    need(isinstance(columns, list), "columns is missing")
    need(len(states) + len(columns) <= MAX_NAMES, f"it has more than {MAX_NAMES} states and columns")
    need(all(map(is_state, columns)) and len(set(columns)) == len(columns), "columns is malformed")
    need(all(stream_of(c) in lengths and c not in states for c in columns), "columns is malformed")

    files = {}
    listed = document.get("files")
    need(isinstance(listed, list), "files is missing")
    # Each is asked for on the disk: what is listed without bound would be waited for without end.
    need(len(listed) <= MAX_FILES, f"it lists more than {MAX_FILES} files")
    for entry in listed:
        sound = isinstance(entry, dict) and is_relative(entry.get("name")) and is_key(entry.get("xxh3"))
        need(
            sound and type(entry.get("size")) is int and 0 <= entry["size"] < 1 << 50, "an entry of files is malformed"
        )
        need(entry["name"] not in files, "a file is listed twice")
        files[entry["name"]] = (entry["size"], entry["xxh3"])
    provenance: Any = document.get("provenance")
    created: Any = document.get("created")
    need(isinstance(provenance, dict) and isinstance(created, str), "provenance or created is malformed")
    return Manifest(segment, space, base, known, lengths, states, tuple(columns), files, provenance, created)


def _parse(data: bytes, where: str | Path) -> dict[str, Any]:
    """`parse_json`, but `samples.keys` as `Keys` where they are written as we write them: they are nine tenths of a
    manifest, and read as JSON each becomes an object."""
    start = data.find(_BEFORE_KEYS) + len(_BEFORE_KEYS)
    end = data.find(b"]", start)
    # Whatever else is called so, in a provenance say, cannot be told apart before the rest is parsed.
    if start >= len(_BEFORE_KEYS) and end > start and data.find(_BEFORE_KEYS, start) < 0 and (end - start) % 35 == 34:
        text = np.frombuffer(data[start:end] + b",", np.uint8).reshape(-1, 35)
        if (text[:, [0, 33, 34]] == np.frombuffer(b'"",', np.uint8)).all() and (text < 128).all():
            document = parse_json(data[:start] + data[end:], where)
            samples = document.get("samples")
            if isinstance(samples, dict) and samples.get("keys") == []:
                with suppress(ValueError):  # which the keys as JSON raise again
                    return {**document, "samples": {**samples, "keys": Keys.of_text(text[:, 1:33].tobytes().decode())}}
    return parse_json(data, where)
