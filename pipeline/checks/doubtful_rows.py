"""What is odd about the rows of a task: said with counts, before hours are spent on them, and left to the user.

None of it is refused: real data sets have blank texts, texts that two people labelled differently, and rows that stand
twice. But a score on them is not what it seems.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from pipeline.extract.tasks.base import SPLITS, Label, TaskSpec
from pipeline.jobs.extracted import first_views, views_of
from pipeline.store import TaskTable
from pipeline.store.format.keys import Keys
from pipeline.store.tables.texts import Texts, numbered

LOOKED_AT = 2000  # images whose boxes are held against their outlines
UNLIKE = 0.05  # share of boxes; single ones are wrong in public data sets too
OUTSIDE = "O"  # the tag of a word in no span
OWN = (
    "table",
    "image folder",
    "mask folder",
    "COCO annotations",
    "VOC annotations",
)  # sources of tasks that we split where no split is given


def doubts(tables: Mapping[str, TaskTable], images: bool = False) -> list[str]:
    """A sentence for each oddity in the rows of `tables` (split → table). `images`: compare them by what they show, the
    sample key, rather than by the names of their files; views that were made of an image are no images of their own."""
    tables = {name: _plain_views(tables[name]) if images else tables[name] for name in SPLITS if name in tables}
    if not tables:
        return []
    rows = dict(zip(tables, _numbered([_contents(table, images) for table in tables.values()]), strict=True))
    found = [] if images else [blank_doubt(table.texts, f"{name} rows") for name, table in tables.items()]
    found += _labels(tables)
    found += [_constant(table) for table in tables.values()]
    found.append(_contradictions(tables, rows, images))
    for place, name in enumerate(tables):
        before = list(tables)[:place]
        found.append(_shared(name, before, tables, rows, images))
    return [sentence for sentence in found if sentence]


def _plain_views(table: TaskTable) -> TaskTable:
    """Each image of `table` once, as it is."""
    if views_of(table) == 1:
        return table
    plain = first_views(table, 1)
    return replace(plain, texts=[texts[:1] for texts in plain.texts])  # without the number of the view


def _labels(tables: Mapping[str, TaskTable]) -> list[str]:
    """What makes it doubtful that the labels are what was meant."""
    table = next(iter(tables.values()), None)
    if table is None:
        return []
    target, names = table.header["spec"]["target"], table.header["spec"]["labels"]
    found, alike = [], dict[str, list[str]]()
    if target == "instances":
        found += [said] if (said := _boxes(table)) else []
    if target == "pair":
        own = next((slot for slot in table.header.get("slots", {}) if slot not in table.joined), "")
        found += [
            f"all {len(table):,} {table.split} rows have one and the same {slot}: nothing is told from anything else"
            for slot, keys in {own: table.keys, **table.joined}.items()
            if len(table) > 1 and Keys.of(keys).distinct() == 1
        ]
    for name in names:
        alike.setdefault(_plain(name), []).append(name)
    if same := [group for group in alike.values() if len(group) > 1]:
        shown = " and ".join(map(repr, same[0]))
        found.append(f"{shown} are {len(same[0])} labels, though they differ in blanks, case or a number's form only")
    if names and all(re.fullmatch(r"[+-]?\d+,\d+", name) for name in names):
        found.append(f"labels such as {names[0]!r} are classes, not numbers: those have a decimal point")
    if target == "tags" and OUTSIDE not in names:
        few = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        found.append(f"no tag is called {OUTSIDE} ({few}): every word counts as one of a span")
    if target == "classes" and all(len(label or ()) < 2 for t in tables.values() for label in t.labels):
        found.append("no row has more than one label: is it the right --separator?")
    return found


def _constant(table: TaskTable) -> str:
    """Whether all classes or numbers of a split are one and the same."""
    spec, known = table.header["spec"], len(table.labels) - table.labels.count(None)
    if spec["target"] not in ("class", "number") or known < 2:
        return ""
    first = next(label for label in table.labels if label is not None)
    if table.labels.count(first) < known:
        return ""
    advice = "; --stratify holds rows of each class out" if _ours(table) and spec["target"] == "class" else ""
    said = f"all {known:,} {table.split} rows are labelled {TaskSpec.from_dict(spec).named(first)}"
    if table.split == "train":
        return f"{said}: there is nothing to tell apart"
    return f"{said}: no score on them tells a model from one that always says so{advice}"


def _ours(table: TaskTable) -> bool:
    """Whether we have drawn the split from the rows."""
    origin = table.header.get("provenance", {})
    held = origin.get("splits") == "held-out" and origin.get("source") in OWN
    return bool(held and table.split not in origin.get("files", ()))


def _boxes(table: TaskTable) -> str:
    """Whether boxes are those of their outlines: with two corners for left, top, width and height they are not."""
    looked, unlike = 0, list[int]()
    for place, objects in enumerate(table.labels[:LOOKED_AT]):
        for thing in objects or ():
            if not isinstance(polygons := json.loads(thing["outline"]), list):
                continue
            looked += 1
            if _share(thing, [v for p in polygons for v in p[::2]], [v for p in polygons for v in p[1::2]]) < 0.5:
                unlike.append(place)
    if len(unlike) <= UNLIKE * looked:
        return ""
    return (
        f"{len(unlike):,} of {looked:,} boxes are not those of their outlines, first in {shown(table, unlike[0])}: are "
        "they left, top, width, height?"
    )


def _share(box: Mapping[str, float], xs: Sequence[float], ys: Sequence[float]) -> float:
    """What a box and the one around points have in common, as a share of what they cover together."""
    sides, common = [(box["left"], box["width"], xs), (box["top"], box["height"], ys)], 1.0
    for low, length, points in sides:
        common *= max(0.0, min(low + length, max(points)) - max(low, min(points)))
    around = (max(xs) - min(xs)) * (max(ys) - min(ys))
    return common / max(box["width"] * box["height"] + around - common, 1e-9)


def _plain(name: str) -> str:
    """What labels that mean the same are likely to have in common."""
    try:
        return repr(float(name))
    except ValueError:
        return " ".join(name.split()).casefold()


def limit_doubt(limit: int | None, table: TaskTable, views: int = 1) -> str:
    """What to say of a --limit above the rows of `table`, which has each `views` times; "" where it is not."""
    there, total = len(table) // views, table.header.get("total", 0)
    if limit is None or limit <= there:
        return ""
    if there < total:
        return (
            f"--limit {limit:,}: the store holds {there:,} of the {total:,} {table.split} rows, all of them are used; "
            "extract with a larger --limit for more"
        )
    return f"--limit {limit:,}: there are {there:,} {table.split} rows, all of them are used"


def _contents(table: TaskTable, images: bool) -> Sequence[Hashable] | Texts:
    """What each row is known by: its texts, where the table has them and they are not names of files; of pairs, what
    keeps rows in one split."""
    if table.header["spec"]["target"] == "pair":
        return _together(table)
    if images:
        return table.keys
    if isinstance(table.texts, Texts) and table.texts.counts().min(initial=1):
        return table.texts
    return [tuple(texts) or key for key, texts in zip(table.keys, table.texts, strict=True)]


def _numbered(contents: Sequence[Sequence[Hashable] | Texts]) -> list[np.ndarray]:
    """(n,) int64 for each of `contents`: a number a row, the same for rows of equal contents, in any of them."""
    if all(isinstance(own, Texts) for own in contents):
        return numbered([own for own in contents if isinstance(own, Texts)])
    if all(isinstance(own, Keys) for own in contents):
        joined = Keys.joined(own for own in contents if isinstance(own, Keys))
        numbers = joined.numbers()
        return np.split(numbers, np.cumsum([len(own) for own in contents])[:-1])
    known: dict[Hashable, int] = {}
    plain = [map(tuple, own) if isinstance(own, Texts) else own for own in contents]
    return [np.fromiter((known.setdefault(c, len(known)) for c in own), np.int64) for own in plain]


def blank_doubt(rows: Sequence[Sequence[str]], what: str) -> str:
    """What to say of rows of which a text is blank; "" where none is."""
    if isinstance(rows, Texts):
        blank = int(np.count_nonzero(rows.blank()))
    else:
        blank = sum(any(not text.strip() for text in texts) for texts in rows)
    return f"{blank:,} of {len(rows):,} {what} have a blank text" if blank else ""


def _together(table: TaskTable) -> Sequence[Hashable]:
    """The key of what each pair shares with others, such as its image."""
    slots, column = table.header.get("slots", {}), table.header.get("provenance", {}).get("together")
    slot = next((name for name, fields in slots.items() if column in fields), "")
    return table.joined.get(slot, table.keys)


def _contradictions(tables: Mapping[str, TaskTable], rows: Mapping[str, np.ndarray], images: bool) -> str:
    """Rows that are alike and have another label than the first of them."""
    labels: list[Label] = [*chain.from_iterable(table.labels for table in tables.values())]
    numbers = np.concatenate([np.zeros(0, np.int64), *rows.values()])
    known = np.arange(len(labels))
    if None in labels:
        known = np.flatnonzero([label is not None for label in labels])
    counts = np.bincount(numbers[known])
    places = known[counts[numbers[known]] > 1]  # the others have none to be unlike
    first = np.zeros(len(counts), np.int64)
    first[numbers[places][::-1]] = places[::-1]  # the last that is written stays: the first place of each
    others = first[numbers[places]]
    if all(table.header["spec"]["target"] in ("class", "number") for table in tables.values()):
        values = np.array(labels, np.float64)
        unlike = places[values[places] != values[others]]
    else:
        pairs = zip(places.tolist(), others.tolist(), strict=True)
        unlike = np.array([place for place, other in pairs if labels[place] != labels[other]], np.int64)
    if not len(unlike):
        return ""
    starts = np.cumsum([0, *map(len, tables.values())])
    which = int(np.searchsorted(starts, unlike[0], side="right")) - 1
    table, place = list(tables.values())[which], int(unlike[0] - starts[which])
    spec = TaskSpec.from_dict(table.header["spec"])
    one, other = spec.named(labels[first[numbers[unlike[0]]]]), spec.named(labels[unlike[0]])
    return (
        f"{len(np.unique(numbers[unlike])):,} of {np.count_nonzero(counts):,} {'image' if images else 'text'}s stand "
        f"with two labels, first: {shown(table, place)} as {one} and {other}"
    )


def _shared(
    name: str, before: Sequence[str], tables: Mapping[str, TaskTable], rows: Mapping[str, np.ndarray], images: bool
) -> str:
    """Rows of the split `name` that stand in one of the splits `before` too."""
    own = rows[name]
    seen = np.zeros(1 + max(int(numbers.max(initial=0)) for numbers in rows.values()), bool)
    for other in before:
        seen[rows[other]] = True
    shared = np.flatnonzero(seen[own])
    if not len(shared):
        return ""
    origin = tables[name].header.get("provenance", {})
    if tables[name].header["spec"]["target"] == "pair":
        return (
            f"{len(np.unique(own[shared])):,} of the {len(np.unique(own)):,} {origin.get('together', 'sample')}s of "
            f"{name} stand in {' or '.join(before)} too, first: {shown(tables[name], int(shared[0]))}"
        )
    advice = "give each image once" if images else "remove what stands twice, or give --validation and --test"
    return (
        f"{len(shared):,} of {len(tables[name]):,} {name} rows stand in {' or '.join(before)} too, first: "
        f"{shown(tables[name], int(shared[0]))}"
        + (f"; the split is drawn from the rows: {advice}" if _ours(tables[name]) else "")
    )


def shown(table: TaskTable, place: int) -> str:
    """The beginning of a row's texts, in quotes."""
    text = " | ".join(table.texts[place])
    return repr(text if len(text) <= 60 else text[:60] + "…")
