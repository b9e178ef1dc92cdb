"""Which of a store's task tables a run reads: all of one version of the task, never a mix.

A task is its rows and the columns they were read from; its name is only its file's. The store keeps the tables of every
version: of an edited file, of another file of the same name, of another label column. Splits of different versions must
not meet, because what one holds out the other may train on. Where a name fits several, the data at hand decides; of
editions of one origin that which was extracted last; and else the user, by file or by id (`train@3f2a91bc04de`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.checks.stored import check_header, check_table
from pipeline.extract.tasks import canonical_name, split_id
from pipeline.extract.tasks.base import DENSE
from pipeline.extract.tasks.glue import USUAL_GRID
from pipeline.jobs.slots import slot_of
from pipeline.recipe import Recipe
from pipeline.store import Space, TaskTable, digest_json
from pipeline.store.errors import StoreError, UserError
from pipeline.store.format.digest import digest_bytes
from pipeline.store.tables.records import Record
from pipeline.store.tables.table import TableInfo, created_of, version_of

if TYPE_CHECKING:
    from pipeline.lookup.source_files import AtHand

ID_LENGTH = 12


class AmbiguousTask(StoreError):
    """A task was asked for by a name that fits several."""


@dataclass
class Version:
    """The stored tables of one version of a task, each with its header."""

    task: str
    id: str
    slot: str = ""  # of a task with several slots, the one whose samples are in this feature space
    tables: list[tuple[TableInfo, dict[str, Any]]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What it is called where its task's name would not do."""
        return f"{self.task}@{self.id[:ID_LENGTH]}"

    @property
    def header(self) -> dict[str, Any]:
        """Of one of its tables: in spec and provenance all agree."""
        return self.tables[0][1]

    @property
    def created(self) -> str:
        """When a table of it was written last; "" where none says."""
        return max(created_of(header) for _, header in self.tables)

    @property
    def origins(self) -> dict[str, str]:
        """Where it was read from → when it was written from there last."""
        found: dict[str, str] = {}
        for _, header in self.tables:
            if origin := str(header.get("origin") or ""):
                found[origin] = max(found.get(origin, ""), created_of(header))
        return found

    @property
    def rows(self) -> dict[str, int]:
        """Split → rows of its largest table."""
        return {info.split: info.rows for info, _ in sorted(self.tables, key=lambda t: t[0].rows)}

    def replaced_by(self, other: Version) -> bool:
        """Whether `other` is a later edition: the same columns, written later from wherever this was read from."""
        mine, theirs = self.origins, other.origins
        later = bool(mine) and all("" < when < theirs.get(origin, "") for origin, when in mine.items())
        return later and _columns(self.header) == _columns(other.header)

    @property
    def reads(self) -> str:
        """Its columns and classes, and when it was made, for people who must choose."""
        slot = f"slot {self.slot}: " if self.slot else ""
        drawn = ", stratified" if _object(self.header, "provenance").get("stratified") else ""
        return f"{slot}{columns_text(self.header)}{drawn}, extracted {self.created[:16].replace('T', ' ') or '?'}"

    @property
    def counts(self) -> str:
        """ "test 6, train 48" """
        return ", ".join(f"{split} {count:,}" for split, count in sorted(self.rows.items()))


def versions_of(space: Space, task: str | None = None, damaged: list[TableInfo] | None = None) -> list[Version]:
    """The versions of `task`, or of every task, in `space`, the last written first. Damaged tables are added to
    `damaged`; without it, raises StoreError for one."""
    found: dict[tuple[str, str, str], Version] = {}
    for info in space.tables():
        if task is None or info.task == task:
            try:
                header = space.read_header(info)
                check_header(header, space.files.where(info.path))
            except StoreError:
                if damaged is None:
                    raise
                damaged.append(info)
                continue
            which = (info.task, version_of(header), str(header.get("slot") or ""))
            found.setdefault(which, Version(*which)).tables.append((info, header))
    return sorted(found.values(), key=lambda v: v.created, reverse=True)


def stored_tables(
    space: Space, recipe: Recipe, images: bool = False, version: str | None = None
) -> dict[str, TaskTable]:
    """The tables of the recipe's task by split: of `version`, else of the one that is what the recipe says of columns
    and files. `images`: its rows are images.

    Raises StoreError saying what differs where none is, or that tables are gone; AmbiguousTask where several are.
    """
    return chosen_tables(space, recipe, stored_versions(space, recipe, images, version))


def stored_versions(space: Space, recipe: Recipe, images: bool = False, version: str | None = None) -> list[Version]:
    """The versions of the recipe's task, for its slot, that are what it says of columns and files, one at least; or
    `version`."""
    from pipeline.lookup.source_files import AtHand

    task, wanted = canonical_name(recipe.task), version or split_id(recipe.task)[1]
    known = versions_of(space, task)
    own = [v for v in known if v.slot == (slot := slot_of(recipe))]
    if known and not own:
        there = ", ".join(sorted({f"slot {v.slot}" if v.slot else "a backbone alone" for v in known}))
        raise StoreError(f"task {task!r} is here for {there}, not for {f'slot {slot}' if slot else 'a backbone alone'}")
    if not wanted:
        return _fitting(space, recipe, own, {v.id for v in known}, AtHand(recipe, images))
    fitting = [v for v in own if v.id.startswith(wanted)]
    if not fitting and version:
        raise StoreError(f"the store no longer has the rows of task {task!r} as they were then")
    if not fitting:
        there = ", ".join(v.name for v in own)
        raise StoreError(f"there is no task {recipe.task} in this feature space, there is {there}")
    head = fitting[0].header
    data = AtHand(recipe, images)
    if not version and (differs := unlike(recipe, head) or data.differs(head, lambda: _image_names(space, fitting[0]))):
        raise StoreError(f"task {recipe.task} is not as asked for: {differs}")
    return fitting


def chosen_tables(space: Space, recipe: Recipe, versions: Sequence[Version]) -> dict[str, TaskTable]:
    """The tables of the one version among `versions`. AmbiguousTask where several differ in their rows."""
    fitting = _distinct(space, versions)
    if len(fitting) > 1:
        which = "; ".join(f"{v.name}: {v.counts}, {v.reads}" for v in fitting)
        columns, drawn = ({json.dumps(_columns(v.header)[part]) for v in fitting} for part in (slice(3), slice(3, 4)))
        ways = [
            *(["by its file, --task PATH"] if canonical_name(recipe.task) == recipe.task else []),
            *(["by its columns, --text and --label"] if len(columns) > 1 else []),
            *(["by --stratify or --no-stratify"] if len(drawn) > 1 else []),
            f"by its id, such as --task {fitting[0].name}",
        ]
        raise AmbiguousTask(
            f"task {recipe.task!r} fits {len(fitting)} tasks of this feature space: say which one {' or '.join(ways)}; "
            f"there are: {which}"
        )
    return _whole(fitting[0], _read(space, fitting[0]))


def _fitting(
    space: Space, recipe: Recipe, known: Sequence[Version], there: Collection[str], data: AtHand
) -> list[Version]:
    """The versions that are what the recipe says, without those of which a later edition is among them. `there`: the
    ids of all versions that have tables."""
    task, refused, found = canonical_name(recipe.task), "", []
    for version in known:
        names = partial(_image_names, space, version)
        differs = unlike(recipe, version.header) or data.differs(version.header, names)
        refused = refused or differs
        if not differs:
            found.append(version)
    if not found:
        raise StoreError(f"task {task!r} is in the store, but not as asked for: {refused}")
    lost = [r for r in space.records() if r.task == task and r.version not in there]
    if lost and not data:
        # It may be the one that is meant, and nothing that is left says so.
        name = f"{task}@{lost[0].version[:ID_LENGTH]}"
        raise StoreError(
            f"the tables of {name} are gone from the store: copy them back, extract again, or say which task is meant: "
            f"--task PATH, or --task {found[0].name}"
        )
    return [v for v in found if not any(v.replaced_by(other) for other in found)]


def _image_names(space: Space, version: Version) -> tuple[str, ...]:
    """The first text of every row that the version has, which of images is their name; () where its tables do not hold
    all rows."""
    totals = {info.split: header.get("total") for info, header in version.tables}
    if version.rows != totals or totals.keys() != set(version.header.get("beside") or ()):
        return ()
    return tuple(texts[0] for table in _read(space, version).values() for texts in table.texts)


def _read(space: Space, version: Version) -> dict[str, TaskTable]:
    """The largest table of each split, of equals the last written."""
    out: dict[str, TaskTable] = {}
    for info, _ in sorted(version.tables, key=lambda t: (t[0].rows, created_of(t[1])), reverse=True):
        if info.split not in out:
            out[info.split] = check_table(space.read_table(info), space.files.where(info.path))
    return dict(sorted(out.items()))


def written_beside(
    space: Space, tables: Mapping[str, TaskTable], others: Mapping[str, Mapping[str, TaskTable]]
) -> dict[str, TaskTable]:
    """`tables` of a slot, each by the one of its version and size that was written beside the rows of `others`, slot →
    split → table, where there is one: a space that was extracted with several others has one for each, as one of texts
    has that stood beside two backbones which see images of other sizes."""
    out = dict(tables)
    for split, table in tables.items():
        keys = {slot: of[split].keys for slot, of in others.items() if split in of}
        if table.joined == keys:
            continue
        for info in space.tables():
            if (info.task, info.split, info.rows) == (table.task, split, len(table)):
                other = check_table(space.read_table(info), space.files.where(info.path))
                same = all(other.header.get(k) == table.header.get(k) for k in ("version", "slot"))
                if same and other.joined == keys:
                    out[split] = other
    return out


def _whole(version: Version, tables: dict[str, TaskTable]) -> dict[str, TaskTable]:
    """`tables`, if all is there that was written beside them. Raises StoreError."""
    gone: dict[str, int] = {}
    for table in tables.values():
        beside = table.header.get("beside")
        for split, rows in beside.items() if isinstance(beside, dict) else ():
            if type(rows) is int and (split not in tables or len(tables[split]) < rows):
                gone[split] = max(rows, gone.get(split, 0))
    if gone:
        what = " and ".join(f"{rows:,} {split} rows" for split, rows in sorted(gone.items()))
        raise StoreError(
            f"{what} of {version.name} are not in the store, though they were extracted with its other rows: an "
            "extraction was stopped, or a table was deleted"
        )
    return tables


def _distinct(space: Space, versions: Sequence[Version]) -> list[Version]:
    """One of those that hold the same rows with the same labels: it does not matter which is read."""
    if len(versions) < 2:
        return list(versions)
    found: dict[str, Version] = {}
    for version in versions:
        tables = _read(space, version)
        rows = {
            split: [list(t.keys), [_plain(label) for label in t.labels], list(t.texts), *_beside(t)]
            for split, t in tables.items()
        }
        found.setdefault(digest_json([rows, version.header.get("spec")]), version)
    return list(found.values())


def _plain(label: Any) -> Any:
    """A target as JSON has it."""
    return digest_bytes(label) if isinstance(label, bytes) else label


def _beside(table: TaskTable) -> list[Any]:
    """The keys of a table's other slots, as JSON; nothing for a task of one."""
    return [{slot: list(keys) for slot, keys in table.joined.items()}] if table.joined else []


def columns_text(header: Mapping[str, Any]) -> str:
    """ "premise, claim to gold (no, yes)": the columns and classes of a table."""
    spec = _object(header, "spec")
    fields, target = ", ".join(_names(spec.get("fields"))), spec.get("target")
    if target in ("none", "tokens", "pair"):
        return f"{fields}, {({'none': 'unlabelled', 'tokens': 'tokens are learned', 'pair': 'of pairs'})[str(target)]}"
    label, classes = _object(header, "provenance").get("label", "label"), _names(spec.get("labels"))
    what = ", ".join(classes[:4]) + (", …" if len(classes) > 4 else "") if classes else "a number"
    return f"{fields} to {target if target in DENSE else label} ({what})"


def task_id(header: Mapping[str, Any]) -> str:
    """The name that no other task has: "train@3f2a91bc04de"."""
    return f"{header.get('task')}@{version_of(header)[:ID_LENGTH]}"


def _columns(header: Mapping[str, Any]) -> list[Any]:
    spec, made = _object(header, "spec"), _object(header, "provenance")
    return [_names(spec.get("fields")), made.get("label"), spec.get("target"), bool(made.get("stratified"))]


def read_by(header: Mapping[str, Any]) -> dict[str, Any]:
    """The options by which rows were read of one table of texts; {} where they were read of something else, or of
    several files, whose places nobody noted."""
    fields, label, _, stratified = _columns(header)
    made = _object(header, "provenance")
    alone = made.get("source") == "table" and list(_object(made, "files")) == ["train"] and "slots" not in header
    if not (alone and 1 <= len(fields) <= 2 and isinstance(label, str)):
        return {}
    said = {"separator": str(made.get("separator") or "") or None, "columns": tuple(_names(made.get("columns")))}
    return {"text": fields[0], "text_pair": (*fields, None)[1], "label": label, "stratify": stratified, **said}


def _object(header: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A member of a header that is an object; {} where it is none."""
    value = header.get(name)
    return value if isinstance(value, dict) else {}


def _names(value: Any) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list) else []


def unlike(recipe: Recipe, header: Mapping[str, Any]) -> str:
    """In what a stored table was not read as `recipe` says, "" where it was. What is left out fits anything, and so
    does a table without the fact. UserError for what no extraction would make so."""
    spec, made = _object(header, "spec"), _object(header, "provenance")
    fields = [*_names(spec.get("fields")), "", ""]
    for option, asked, there in (
        ("--image" if recipe.image else "--text", recipe.image or recipe.text, fields[0]),
        ("--text-pair", recipe.text_pair, fields[1]),
        ("--label", recipe.label, made.get("label")),
        ("--separator", recipe.separator, made.get("separator")),
    ):
        if asked is not None and there is not None and asked != there:
            return f"{option} was {there!r}, now {asked!r}"
    if recipe.separator is not None and made.get("source") == "table" and "separator" not in made:
        return f"--separator was none, now {recipe.separator!r}"
    if recipe.columns and made.get("source") == "table" and list(recipe.columns) != made.get("columns", []):
        was = ",".join(made.get("columns", [])) or "those of its first line"
        return f"--columns was {was}, now {','.join(recipe.columns)}"
    if recipe.stratify is not None and recipe.stratify != bool(made.get("stratified")):
        was, now = ("without", "with") if recipe.stratify else ("with", "without")
        return f"rows were held out {was} --stratify, now {now} it"
    values = (spec.get("values") or []) if spec.get("target") not in DENSE else []
    step = values[1] - values[0] if len(values) > 1 else 0.0
    # Recipes of earlier versions all state the usual grid, also of tasks that have none of the kind.
    fixed = not step or made.get("source") == "table"
    if recipe.grid is not None and fixed and recipe.grid != USUAL_GRID:
        has = f"task {recipe.task} has no such step, as STS-B has"
        raise UserError(f"--target-step {recipe.grid:g}: {has}; leave it out")
    if recipe.grid is not None and not fixed and not math.isclose(step, recipe.grid):
        return f"--target-step was {step:g}, now {recipe.grid:g}"
    from pipeline.lookup.objective import target_types  # objectives load torch, which `pipeline store` does without

    learned, there = target_types(recipe), spec.get("target")
    if learned and there not in learned:
        return f"--objective {recipe.objective} learns targets of type {' or '.join(learned)}, these are {there}"
    return ""


def save_tables(space: Space, made: Mapping[str, TaskTable], states: Sequence[str]) -> None:
    """Store the tables of an extraction, and the record of it: of these samples `states` are stored. What is there
    already is left alone unless another version has come since, so that an extraction with nothing to do writes
    nothing."""
    first = next(iter(made.values()))
    version, rows = version_of(first.header), {split: len(table) for split, table in made.items()}
    named = Record(first.task, version, rows)
    stored = [v for v in versions_of(space, first.task) if v.slot == str(first.header.get("slot") or "")]
    own = [(info, header) for v in stored if v.id == version for info, header in v.tables]
    for split, table in made.items():
        table.header["extracted"] = named.id
        alike = [
            (info, header)
            for info, header in own
            if (info.split, info.rows) == (split, len(table)) and _current(header, table.header, stored)
        ]
        if not any(_equal(space.read_table(info), table) for info, _ in alike):
            space.save_table(table)
    space.save_record(named)
    space.save_record(Record(first.task, version, rows, tuple(states)))


def _current(header: Mapping[str, Any], new: Mapping[str, Any], stored: Sequence[Version]) -> bool:
    """Whether a stored table with `header` says what one with the header `new` would: that its version is the latest
    edition of the new one's origin. With no other version there is nothing to say."""
    others = [v for v in stored if v.id != version_of(new)]
    if not others:
        return True
    rivals = [v for v in others if new.get("origin") in v.origins and _columns(v.header) == _columns(new)]
    origin = str(new.get("origin"))
    return header.get("origin") == origin and all(v.origins[origin] < created_of(header) for v in rivals)


def _equal(one: TaskTable, other: TaskTable) -> bool:
    """Whether two tables say the same; when and where from they were written does not matter, and a stored header has
    no `rows`."""
    apart = ("created", "rows", "origin", "extracted")
    heads = [{k: v for k, v in t.header.items() if k not in apart} for t in (one, other)]
    return (
        digest_json(heads[0]) == digest_json(heads[1])
        and ((one.keys, one.labels, one.texts, one.metas) == (other.keys, other.labels, other.texts, other.metas))
        and one.joined == other.joined
    )
