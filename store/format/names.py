"""Names, limits and paths of the on-disk format; every name read from a store is checked here before it is used.

A state or column is named `<stream>.<what>` (`encoder.3`, `decoder.ids`); the two arrays the format adds beside them
are `<state>.scale` and `<stream>.lengths`. Paths are relative to the store, with forward slashes.
"""

from __future__ import annotations

import re
import secrets
from datetime import UTC, datetime

from pipeline.store.errors import StoreError

FORMAT = 1
TABLE_FORMAT = 2
QUARANTINE = "quarantine"
CHUNK_BYTES = 8 << 20
SEGMENT_BYTES = 128 << 20
SEGMENT_SECONDS = 60.0

MAX_JSON = 64 << 20
MAX_SMALL_JSON = 4 << 20
MAX_CHUNK_BYTES = 1 << 30
MAX_TABLE_BYTES = 1 << 30
# Text seldom compresses more than twentyfold; what does more than this is a decompression bomb.
MAX_UNPACKED_RATIO, UNPACKED_SLACK, MAX_UNPACKED = 400, 16 << 20, 8 << 30
MAX_WEIGHTS_BYTES = 16 << 30
MAX_LENGTH = 1 << 31
MAX_ROWS = 1 << 40
MAX_WIDTH = 1 << 20
MAX_FILES = 1 << 16  # of one segment
MAX_NAMES = 1 << 12  # states and columns of one segment
MAX_STREAMS = 1 << 8

_KEY = re.compile(r"[0-9a-f]{32}")
_KEYS = re.compile(r"[0-9a-f]*")
_STREAM = re.compile(r"[a-z][a-z0-9_]{0,31}")
_ARRAY = re.compile(r"[a-z][a-z0-9_]{0,31}\.[A-Za-z0-9][A-Za-z0-9_-]{0,63}(\.[A-Za-z0-9][A-Za-z0-9_-]{0,63}){0,3}")
_SEGMENT = re.compile(r"[0-9]{8}T[0-9]{9}-[0-9a-f]{16}")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+@-]{0,127}")


def stream_of(name: str) -> str:
    """The stream a state or column belongs to: the part of its name before the first dot."""
    return name.split(".", 1)[0]


def is_key(text: object) -> bool:
    """Whether `text` is an xxh3-128 in lower hex: a sample key, a space id or a file digest."""
    return isinstance(text, str) and _KEY.fullmatch(text) is not None


def are_keys(texts: list[str]) -> bool:
    """`is_key` for many at once, an order of magnitude faster than one by one."""
    if not set(map(type, texts)) <= {str} or not set(map(len, texts)) <= {32}:
        return False
    return _KEYS.fullmatch("".join(texts)) is not None


def is_stream(text: object) -> bool:
    return isinstance(text, str) and _STREAM.fullmatch(text) is not None


def is_state(text: object) -> bool:
    """Whether `text` may name a state or column: `<stream>.<what>`, and not one of the format's own arrays."""
    if not isinstance(text, str) or _ARRAY.fullmatch(text) is None:
        return False
    return not text.endswith(".scale") and text.split(".", 1)[1] != "lengths"


def is_segment(text: object) -> bool:
    return isinstance(text, str) and _SEGMENT.fullmatch(text) is not None


def is_file(text: object) -> bool:
    """Whether `text` may name one file or folder inside a store: no separators, no leading dot."""
    return isinstance(text, str) and _FILE.fullmatch(text) is not None


def is_relative(text: object) -> bool:
    """Whether `text` is a relative path of at most six safe names."""
    return isinstance(text, str) and text.count("/") < 6 and all(is_file(part) for part in text.split("/"))


def temporary_name(path: str) -> str:
    """A name beside `path` under which it is written before it is renamed."""
    folder, _, base = path.rpartition("/")
    return f"{folder}/.{base}.{secrets.token_hex(4)}.tmp".lstrip("/")


def is_temporary(path: str) -> bool:
    """Whether `path` is what a kill leaves of a file that was not yet whole: never read, of no account."""
    return _TEMPORARY.fullmatch(path.rsplit("/", 1)[-1]) is not None


def check_task(text: str) -> str:
    """`text` if it may name a task or split in a path, else StoreError."""
    if not isinstance(text, str) or _TASK.fullmatch(text) is None:
        raise StoreError(
            f"{text!r} cannot name a task or split in a store: use letters, digits and . _ + @ -, at most 128"
        )
    return text


def new_segment_id() -> str:
    """UTC time to the millisecond, which sorts, and 64 random bits, which no other writer shares."""
    now = datetime.now(UTC)
    return f"{now:%Y%m%dT%H%M%S}{now.microsecond // 1000:03d}-{secrets.token_hex(8)}"


def space_path(space: str) -> str:
    return f"spaces/{space}"


def segment_path(space: str, segment: str) -> str:
    return f"spaces/{space}/segments/{segment}"
