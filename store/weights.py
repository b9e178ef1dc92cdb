"""Tail weights, kept once a checkpoint for all its feature spaces: `weights/<digest>/*.safetensors` and `*.json`.

A manifest, written last, lists each file's size and xxh3-128; both are checked before a byte is parsed. Files are only
ever added, and writing the same ones again changes nothing, so any number of processes may do it at once. Each leaves a
note `writer-….json` while it does: what it is making is not damage, and what it leaves when it is killed is not either.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from pipeline.store.errors import MissingStates, StoreError
from pipeline.store.files.local import Files, explain
from pipeline.store.format.digest import digest_bytes
from pipeline.store.format.document import dump_document, load_document, parse_json
from pipeline.store.format.names import FORMAT, MAX_SMALL_JSON, MAX_WEIGHTS_BYTES, is_file, is_key
from pipeline.store.segments.unsealed import abandoned, sign

_KIND = "activation-weights"
_NOTE = re.compile(r"writer-[0-9a-f]{8}\.json")
# The types of safetensors; `safetensors.numpy` reads those that NumPy has by itself.
_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
    "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "F32": np.float32, "F64": np.float64,
    "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
_PAUSE, _PATIENCE = 0.02, 2.0  # seconds between two looks at who else is writing, and for how long to look


def save_weights(files: Files, digest: str, contents: Mapping[str, Mapping[str, Any]]) -> None:
    """Store `contents`: `name.safetensors` → arrays, `name.json` → JSON object. Names already there are kept as is.

    Raises ValueError for other names, StoreError if they cannot be written.
    """
    for name in contents:
        if not is_file(name) or not name.endswith((".safetensors", ".json")) or name == "manifest.json":
            raise ValueError(f"a weights file is called NAME.safetensors or NAME.json, not {name!r}")
    there = listed(files, digest) or {}
    new = {name: content for name, content in contents.items() if name not in there}
    if new or not there:
        dump = {".safetensors": _dump_tensors, ".json": _dump_json}
        add_bytes(files, digest, {name: dump[name[name.rindex(".") :]](content) for name, content in new.items()})


def add_bytes(files: Files, digest: str, contents: Mapping[str, bytes]) -> None:
    """Store files as they are, beside those that are there. Raises StoreError if they cannot be written."""
    folder = _folder(digest)
    there = listed(files, digest) or {}
    needed = 0
    try:
        files.make(folder)
        mine = {name: (len(data), digest_bytes(data)) for name, data in contents.items()}
        note = leave_note(files, digest)
        for name, data in contents.items():
            needed = len(data)
            files.publish(f"{folder}/{name}", data)
        # Others may add names at this moment, and the manifest that is renamed last wins. Whoever writes one has left a
        # note before it read the last one, so once ours are listed and nobody's note is there, nobody will undo it.
        while True:
            listing = listed(files, digest)
            if listing is None or not mine.items() <= listing.items():
                publish_manifest(files, digest, {**there, **(listing or {}), **mine})
            files.remove(note)
            _let_finish(files, digest)
            there = listed(files, digest) or {}
            if mine.items() <= there.items():
                break
            note = leave_note(files, digest)
        files.sync(["weights"])
        for left in notes(files, digest):
            if abandoned(files, left):
                files.remove(left)
    except OSError as error:
        raise explain(error, "writing weights to", files.root, needed, files.free) from error


def _let_finish(files: Files, digest: str) -> None:
    """Wait for those who are at work on the weights of `digest`; not for ever for one who may have died elsewhere."""
    end = time.monotonic() + _PATIENCE
    while being_written(files, digest) and time.monotonic() < end:
        time.sleep(_PAUSE)


def leave_note(files: Files, digest: str) -> str:
    """Say that this process is at work on the weights of `digest`; returns the note, which it removes at the end."""
    note = f"{_folder(digest)}/writer-{secrets.token_hex(4)}.json"
    sign(files, note)
    return note


def notes(files: Files, digest: str) -> list[str]:
    """The notes of those who are at work on the weights of `digest`, or were when they were killed."""
    return [f"weights/{digest}/{name}" for name in files.names(f"weights/{digest}") if _NOTE.fullmatch(name)]


def being_written(files: Files, digest: str) -> bool:
    """Whether anyone who is not surely dead is at work on the weights of `digest`."""
    return any(not abandoned(files, note) for note in notes(files, digest))


def unfinished(files: Files, digest: str) -> list[str]:
    """Files that the manifest of `digest` does not list, the notes of their writers last; none without a note."""
    left = notes(files, digest)
    known = {"manifest.json", *(listed(files, digest) or {})}
    # Without a note they are not ours to judge: a manifest was lost, or is still being copied.
    names = [f"weights/{digest}/{n}" for n in files.names(f"weights/{digest}") if n not in known and is_file(n)]
    return [*(name for name in names if name not in left), *left] if left else []


def publish_manifest(files: Files, digest: str, there: Mapping[str, tuple[int, str]]) -> None:
    """Write the manifest of `digest` that lists `there`: name → (size, xxh3-128)."""
    entries = [{"name": n, "size": s, "xxh3": d} for n, (s, d) in sorted(there.items())]
    document = {"kind": _KIND, "format": FORMAT, "digest": digest, "files": entries}
    files.publish(f"{_folder(digest)}/manifest.json", dump_document(document))


def has_weights(files: Files, digest: str, names: tuple[str, ...] = ()) -> bool:
    """Whether weights of `digest` are stored, all of `names` among them."""
    there = listed(files, digest)
    return there is not None and all(name in there for name in names)


def load_tensors(files: Files, digest: str, name: str) -> dict[str, np.ndarray]:
    """The tensors of `name`, as arrays. Raises MissingStates, or StoreError if the file is damaged."""
    try:
        found = deserialize(_load(files, digest, name))
        return {n: np.frombuffer(t["data"], _DTYPES[t["dtype"]]).reshape(t["shape"]) for n, t in found}
    except (SafetensorError, LookupError, MemoryError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        what = " ".join(str(error).split())[:200]
        raise StoreError(f"weights/{digest}/{name} is not a safetensors file: {what}") from error


def load_json(files: Files, digest: str, name: str) -> dict[str, Any]:
    """The JSON object of `name`. Raises MissingStates, or StoreError if the file is damaged."""
    return parse_json(_load(files, digest, name), files.where(f"{_folder(digest)}/{name}"))


def verify(files: Files, digest: str, deep: bool) -> list[tuple[str, str]]:
    """What is wrong with the weights of `digest`: (path, what) each."""
    found = []
    try:
        there = listed(files, digest) if is_key(digest) else {}
        if there is None and _lost_manifest(files, digest):
            found.append((f"weights/{digest}/manifest.json", "is missing: extract again, which writes the folder anew"))
        for name, (size, _) in (there or {}).items():
            if deep or files.size(f"weights/{digest}/{name}") != size:
                try:
                    _load(files, digest, name)
                except StoreError as error:
                    found.append((f"weights/{digest}/{name}", str(error)))
    except StoreError as error:
        found.append((f"weights/{digest}/manifest.json", str(error)))
    return found


def _lost_manifest(files: Files, digest: str) -> bool:
    """Whether there are files, but neither a manifest nor the note of somebody who is, or was, writing it."""
    names = [name for name in files.names(f"weights/{digest}") if name[0] != "."]
    if not names or "manifest.json" in names or any(_NOTE.fullmatch(name) for name in names):
        return False
    # A note goes after the manifest has come: it may have been finished while we looked.
    return files.size(f"weights/{digest}/manifest.json") is None


def _folder(digest: str) -> str:
    if not is_key(digest):
        raise ValueError(f"a weights digest is 32 lower hex characters, not {digest!r}")
    return f"weights/{digest}"


def stored_bytes(files: Files, digest: str, without: Mapping[str, Any] | None) -> dict[str, bytes]:
    """The files of `digest` as they are, but for those named in `without`. Raises StoreError if one is damaged."""
    there = listed(files, digest) if is_key(digest) else None
    return {name: _load(files, digest, name) for name in there or () if name not in (without or ())}


def listed(files: Files, digest: str) -> dict[str, tuple[int, str]] | None:
    """Name → (size, xxh3-128) as the manifest says; None if there is none."""
    folder = _folder(digest)
    where = f"{folder}/manifest.json"
    if files.size(where) is None:
        return None
    path = files.where(where)
    document = load_document(files.read(where, MAX_SMALL_JSON), path, _KIND)
    entries: Any = document.get("files")
    out = {}
    for entry in entries if isinstance(entries, list) else [{}]:
        sound = isinstance(entry, dict) and is_file(entry.get("name")) and is_key(entry.get("xxh3"))
        sound = sound and type(entry.get("size")) is int and 0 <= entry["size"] <= _limit(entry["name"])
        if not sound or document.get("digest") != digest:
            raise StoreError(
                f"{path} is malformed: restore it from another copy, or delete the folder and extract again"
            )
        out[entry["name"]] = (entry["size"], entry["xxh3"])
    return out


def _limit(name: str) -> int:
    return MAX_SMALL_JSON if name.endswith(".json") else MAX_WEIGHTS_BYTES


def _load(files: Files, digest: str, name: str) -> bytes:
    there = listed(files, digest)
    if there is None or name not in there:
        raise MissingStates(f"weights/{digest}/{name} is not in the store: extract with this checkpoint first")
    path = f"{_folder(digest)}/{name}"
    size, expected = there[name]
    found = files.size(path)
    if found != size:
        what = "is missing" if found is None else f"has {found} bytes instead of {size}"
    else:
        for _ in range(2):
            data = files.read(path, size)
            if digest_bytes(data) == expected:
                return data
            if not files.forget(path):
                break
        what = "differs from its digest"
    raise StoreError(
        f"{files.where(path)} {what}: restore it from another copy, or delete the folder and extract again"
    )


def _dump_tensors(content: Mapping[str, Any]) -> bytes:
    return save({name: np.asarray(tensor, order="C") for name, tensor in content.items()})


def _dump_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, indent=1, allow_nan=False).encode()
