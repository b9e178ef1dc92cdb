"""`log.jsonl`: one JSON object an optimizer step and one an evaluation, readable while the run goes on."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.store.errors import UserError
from pipeline.store.format.digest import Digest, digest_bytes
from pipeline.train.fit.reporters import open_reporters
from pipeline.train.fit.run_files import replace
from pipeline.train.fit.state import State


def finite(value: Any) -> Any:
    """`value` with NaN and infinities as None, since JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` to `path`, atomically."""
    write_bytes(path, (json.dumps(finite(value), indent=2) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`: to a file atomically, to the one that a link names; straight to what is none (a pipe, a
    device), which a new file would take the place of, and to what this process has open (/dev/stdout, /dev/fd/3)."""
    if (number := _opened(path)) is not None:
        sys.stdout.flush()
        with os.fdopen(os.dup(number), "wb") as file:
            file.write(data)
        return
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path = path.resolve()
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(data)
        replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _opened(path: Path) -> int | None:
    """The number under which this process has open what `path` names; None of an ordinary path."""
    found = re.fullmatch(r"/dev/(stdin|stdout|stderr)|(?:/dev|/proc/self)/fd/(\d+)", str(path.absolute()))
    if found is None:
        return None
    return int(found[2]) if found[2] else ("stdin", "stdout", "stderr").index(found[1])


class RunLog:
    """Appends to `run_dir/log.jsonl`, and tells the reporters `names`; `about`: the run's options, for them.

    A resumed run first drops what was logged after its checkpoint `state`, so every step stands there once; what was
    told of it elsewhere is not told again. Raises UserError where the file no longer begins with what the checkpoint
    says.
    """

    def __init__(
        self, run_dir: Path, state: State, names: Sequence[str] = (), about: Mapping[str, Any] | None = None
    ) -> None:
        path = run_dir / "log.jsonl"
        told = path.read_bytes().count(b"\n") if state.step and path.exists() else 0
        kept = _kept(path, state) if state.step and path.exists() else b""
        write_bytes(path, kept)
        self._bytes, self._digest = len(kept), Digest(kept)
        self._file = path.open("a", encoding="utf-8")
        self._known = max(0, told - kept.count(b"\n"))  # entries to come that were told before the kill
        self._reporters = open_reporters(names, run_dir, about or {}, state.step > 0)

    def written(self) -> dict[str, Any]:
        """What stands in the file: how many `bytes`, and their `xxh3`."""
        return {"bytes": self._bytes, "xxh3": self._digest.hexdigest()}

    def step(self, entry: dict[str, Any]) -> None:
        names = ("loss", "lr", "grad_norm", "seconds", "wait_seconds")
        self._write(entry, {f"train/{name}": entry[name] for name in names})

    def evaluation(self, entry: dict[str, Any]) -> None:
        splits = {split: entry.get(split, {}) for split in ("validation", "test")}
        self._write(entry, {f"{split}/{name}": v for split, found in splits.items() for name, v in found.items()})

    def close(self) -> None:
        self._file.close()
        for reporter in self._reporters:
            reporter.close()
        self._reporters = []

    def _write(self, entry: dict[str, Any], values: Mapping[str, float | None]) -> None:
        line = json.dumps(finite(entry)) + "\n"
        self._file.write(line)
        self._file.flush()
        self._bytes += len(line.encode())
        self._digest.update(line.encode())
        if self._known:
            self._known -= 1
            return
        known = {name: float(value) for name, value in values.items() if value is not None}
        for reporter in self._reporters:
            reporter.tell(entry["step"], known)


def _kept(path: Path, state: State) -> bytes:
    """What was logged up to the checkpoint `state`."""
    raw = path.read_bytes()
    if not state.log:
        return _counted(raw, state.step, state.evaluations)
    raw = raw[: state.log["bytes"]]
    if digest_bytes(raw) != state.log["xxh3"]:
        raise UserError(
            f"{path} is not what this run has written, it is damaged or was changed: restore it, or delete it to go on "
            "without the record of the steps before"
        )
    return raw


def _counted(raw: bytes, steps: int, evaluations: int) -> bytes:
    """The lines of the first `steps` steps and `evaluations` evaluations, for a checkpoint of an older version, which
    does not say where the log ended; a torn last line is dropped."""
    lines = []
    for line in raw.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "loss" in entry:
            steps -= 1
            keep = steps >= 0
        else:
            evaluations -= 1
            keep = evaluations >= 0
        if keep:
            lines.append(line + b"\n")
    return b"".join(lines)
