"""The splits of a table of the user's own: files where given, else a fixed part of its rows held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from pipeline.extract.tasks.base import SPLITS, Rows, TaskError, fixed_order
from pipeline.extract.tasks.sheet import Sheet, read_sheet

HELD_OUT = 0.1  # share of the rows, each, for validation and test


@dataclass
class Parted:
    """`everything`: the rows of the table itself; `splits` and `absent` as in `Task`; `provenance`: where they are
    from."""

    everything: Rows
    splits: dict[str, Rows]
    absent: dict[str, str]
    provenance: dict[str, Any]


def part(
    path: Path, table: Sheet, rows_of: Callable[[Sheet, str], Rows], validation: Path | None, test: Path | None
) -> Parted:
    """The rows of `table`, which was read from `path`, by splits. `rows_of(sheet, split)` makes rows of a file.

    Where neither a validation nor a test file is given, a tenth of the rows each is held out by the fixed permutation
    (seed 42, whatever the run's seed), so that a table always splits the same way. With a test file alone, only
    validation rows are held out; with a validation file alone there is no test split. Raises `TaskError` for too few
    rows, and all that `read_sheet` refuses.
    """
    everything = rows_of(table, "train")
    parts = {"train": table.digest}
    given: dict[str, Rows] = {}
    for split, file in (("validation", validation), ("test", test)):
        if file is not None:
            sheet = read_sheet(file)
            given[split], parts[split] = rows_of(sheet, split), sheet.digest
    splits, absent = hold_out(everything, given, str(path))
    revision = table.digest if len(parts) == 1 else xxhash.xxh3_128_hexdigest(repr(sorted(parts.items())).encode())
    provenance = {
        "dataset": path.name, "revision": revision, "licence": "not stated", "source": "table",
        "splits": "files" if validation is not None and test is not None else "held-out", "files": parts,
    }  # fmt: skip
    return Parted(everything, splits, absent, provenance)


def hold_out(everything: Rows, given: Mapping[str, Rows], where: str) -> tuple[dict[str, Rows], dict[str, str]]:
    """The splits of `everything` beside those `given`, and why one is not there, by the rule of `part`. `where`: the
    rows' place, for messages."""
    order, count = fixed_order(len(everything)), len(everything)
    splits, absent = dict(given), {}
    if "validation" not in given and count < (2 if "test" in given else 3):
        raise TaskError(f"{where} has {count} rows, too few to hold any out; add rows")
    share, held = max(1, int(count * HELD_OUT)), 0
    for split in ("validation", "test"):
        if split not in given and "validation" not in given:
            splits[split] = everything.take(order[held : held + share])
            held += share
    if "test" not in splits:
        absent["test"] = "a validation file was given and no test file; give one with --test FILE"
    splits["train"] = everything.take(order[held:])
    return {s: splits[s] for s in SPLITS if s in splits}, absent
