"""The splits of a table of the user's own: files where given, else a fixed part of its rows held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
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
    path: Path,
    table: Sheet,
    rows_of: Callable[[Sheet, str], Rows],
    validation: Path | None,
    test: Path | None,
    stratify: bool = False,
    columns: Sequence[str] = (),
    together: str = "",
) -> Parted:
    """The rows of `table`, which was read from `path`, by splits. `rows_of(sheet, split)` makes rows of a file.
    `columns`: what those of all files are called, where these have no header.

    Where neither a validation nor a test file is given, a tenth of the rows each is held out by the fixed permutation
    (seed 42, whatever the run's seed), so that a table always splits the same way. With a test file alone, only
    validation rows are held out; with a validation file alone there is no test split. `stratify`: rows of one class
    each are held out class by class, in the order of that permutation. `together`: a column of `table`; rows in which
    it has one value stay in one split, and it is of these values that a tenth each is held out. Raises `TaskError` for
    too few rows, and all that `read_sheet` refuses.
    """
    everything = rows_of(table, "train")
    parts = {"train": table.digest}
    given: dict[str, Rows] = {}
    for split, file in (("validation", validation), ("test", test)):
        if file is not None:
            sheet = read_sheet(file, list(columns) or None)
            given[split], parts[split] = rows_of(sheet, split), sheet.digest
    groups = table.column(together) if together else ()
    splits, absent = hold_out(everything, given, str(path), stratify, groups)
    revision = table.digest if len(parts) == 1 else xxhash.xxh3_128_hexdigest(repr(sorted(parts.items())).encode())
    provenance = {
        "dataset": path.name, "revision": revision, "licence": "not stated", "source": "table",
        "splits": "files" if validation is not None and test is not None else "held-out", "files": parts,
        **({"stratified": True} if stratify else {}), **({"columns": list(columns)} if columns else {}),
        **({"together": together} if together else {}),
    }  # fmt: skip
    return Parted(everything, splits, absent, provenance)


def hold_out(
    everything: Rows,
    given: Mapping[str, Rows],
    where: str,
    stratify: bool = False,
    groups: Sequence[Hashable] = (),
) -> tuple[dict[str, Rows], dict[str, str]]:
    """The splits of `everything` beside those `given`, and why one is not there, by the rule of `part`. `where`: the
    rows' place, for messages. `groups`: of each row what it must share a split with others by; () for rows that stand
    for themselves."""
    units = _units(groups) if groups else [[row] for row in range(len(everything))]
    order, count = fixed_order(len(units)), len(units)
    splits, absent = dict(given), {}
    if "validation" not in given and count < (2 if "test" in given else 3):
        what = "distinct ones among its rows" if groups else "rows"
        raise TaskError(f"{where} has {count} {what}, too few to hold any out; add rows")

    def take(places: Sequence[int]) -> Rows:
        return everything.take([row for place in places for row in units[place]])

    share, held = max(1, int(count * HELD_OUT)), 0
    if stratify:
        order = stratified(everything.labels, order, share, 1 if "test" in given else 2)
    for split in ("validation", "test"):
        if split not in given and "validation" not in given:
            splits[split] = take(order[held : held + share])
            held += share
    if "test" not in splits:
        absent["test"] = "a validation file was given and no test file; give one with --test FILE"
    splits["train"] = take(order[held:])
    return {s: splits[s] for s in SPLITS if s in splits}, absent


def _units(groups: Sequence[Hashable]) -> list[list[int]]:
    """The places of equal `groups`, in the order in which these come first."""
    found: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        found.setdefault(group, []).append(place)
    return list(found.values())


def stratified(classes: Sequence[Any], order: Sequence[int], held: int, parts: int) -> list[int]:
    """The places of `order`: those of `parts` splits of `held` rows each, then the rest. In each split a class has its
    share of the rows that are left, rounded such that they add up (the largest remainders up, of equal ones the first
    class), but every class keeps a row in the rest. Within a split and the rest the order stays that of `order`.

    Written here, since what stored splits are known by must not change with a library's version. Raises `TaskError`
    where the classes have too few rows.
    """
    out: list[int] = []
    left = list(order)
    for _ in range(parts):
        rows = Counter(classes[place] for place in left)
        if len(left) - len(rows) < held:
            raise TaskError(
                f"--stratify: {len(order)} rows of {len(rows)} classes are too few to hold {held} out; add rows"
            )
        wanted = {c: min(held * n // len(left), n - 1) for c, n in sorted(rows.items())}
        while sum(wanted.values()) < held:
            short = [c for c in wanted if wanted[c] < rows[c] - 1]
            wanted[max(short, key=lambda c: held * rows[c] - wanted[c] * len(left))] += 1
        rest = []
        for place in left:
            if wanted[classes[place]]:
                wanted[classes[place]] -= 1
                out.append(place)
            else:
                rest.append(place)
        left = rest
    return out + left
