"""Files of a task as bytes and as text; what cannot be read is named."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from pipeline.extract.tasks.base import TaskError


def file_bytes(path: Path) -> bytes:
    """What the file holds. `TaskError` where it cannot be read, or is a pipe."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            # Reading a pipe waits for whoever is to write it, for ever perhaps.
            raise TaskError(f"cannot read {path}: a pipe or device, not a file; save what it gives as a file first")
        return path.read_bytes()
    except FileNotFoundError:
        raise TaskError(f"no such file: {path}") from None
    except OSError as error:
        raise TaskError(f"cannot read {path}: {error.strerror or error}") from None


def decoded(path: Path, raw: bytes) -> str:
    """`raw`, read from `path`, as text without a byte-order mark. `TaskError` naming the line that is not UTF-8."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # error.start counts from after a byte-order mark, hence from the end of what was being decoded
        at = error.start + len(raw) - len(error.object)
        line = raw.count(b"\n", 0, at) + 1
        raise TaskError(
            f"{path} is not UTF-8: byte 0x{raw[at]:02x} at offset {at} (line {line}); save the file as UTF-8"
        ) from None


def file_lines(path: Path) -> list[str]:
    """The lines of a file that are not blank, without the blanks around them."""
    return [line.strip() for line in decoded(path, file_bytes(path)).splitlines() if line.strip()]


def field_text(value: Any) -> str:
    """A value of a table or of JSON as text: text itself, or a number (an id, say); "" for all else, also for NaN,
    which is how some write what is missing."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
        return ""
    return str(value)
