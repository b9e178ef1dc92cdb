"""Task tables of format 2: typed targets, names that are no UTF-8, bounds; those of format 1, read and rewritten."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.store import Space, Store, StoreError, TaskTable
from pipeline.store.format.digest import digest_bytes, digest_json
from pipeline.store.format.keys import Keys
from pipeline.store.tables.parquet import _keys_of, dump, read_rows
from pipeline.store.tables.table import version_of
from tests.store.helpers import key, most_memory, space

OLD_SPEC = {
    "name": "t", "kind": "classification", "labels": ["no", "yes"], "metrics": ["accuracy"], "fields": ["text"],
    "prompt": "t text: {0}", "targets": ["0", "1"], "values": [],
}  # fmt: skip
OLD = {"task": "t", "split": "s", "spec": OLD_SPEC, "provenance": {"source": "table"}, "created": "2026-01-01T00:00Z"}
OLD_VERSION = digest_json([OLD_SPEC, {"source": "table"}])


def put_old(home: Space, header: dict[str, Any], rows: list[list[Any]]) -> Path:
    """A table as format 1 wrote it."""
    head = {**header, "kind_of_file": "activation-task-table", "format": 1, "rows": len(rows)}
    lines = [json.dumps(line).encode() for line in (head, *rows)]
    data = gzip.compress(b"\n".join(lines) + b"\n")
    folder = Path(home.files.where("")) / f"spaces/{home.id}/tasks/{head['task']}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{head['split']}-{len(rows)}-{digest_bytes(data)[:16]}.jsonl.gz"
    path.write_bytes(data)
    return path


def put(home: Space, data: bytes, rows: int) -> None:
    """A Parquet file under the name of a sound table."""
    folder = Path(home.files.where("")) / f"spaces/{home.id}/tasks/t"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"s-{rows}-{digest_bytes(data)[:16]}.parquet").write_bytes(data)


@pytest.mark.parametrize(
    ("target", "labels", "column"),
    [
        ("class", [1, None, 0], pa.int32()),
        ("number", [0.5, None, 2.0], pa.float64()),
        ("classes", [[0, 2], [], None], pa.list_(pa.int32())),
        ("tags", [[1], [0, 0, 1], None], pa.list_(pa.int32())),
        ("none", [None, None, None], None),
    ],
)
def test_targets_have_a_type(tmp_path: Path, target: str, labels: list[Any], column: pa.DataType | None) -> None:
    home = space(tmp_path)
    header = {"task": "t", "split": "s", "spec": {"target": target}}
    metas = [{"word": [-1, 0], "words": i} for i in range(3)]
    table = TaskTable(header, [key(i) for i in range(3)], labels, [["a"], ["b", "1"], []], ["x", "", "z"], metas)
    path = home.save_table(table)
    assert home.load_table("t", "s") == table
    schema = pq.read_schema(path)
    assert schema.field("key").type == pa.binary(16) and (column is None or schema.field("target").type.equals(column))


def test_targets_of_mixed_types_are_refused(tmp_path: Path) -> None:
    header = {"task": "t", "split": "s", "spec": {"target": "class"}}
    for odd in ("yes", 0.5, [1], 1 << 40):
        with pytest.raises(ValueError, match="type"):
            space(tmp_path).save_table(TaskTable(header, [key(0), key(1)], [0, odd]))


def test_names_that_are_no_utf8_come_back(tmp_path: Path) -> None:
    """Names of files on a disk may be any bytes; Python reads those that are no UTF-8 as halves of surrogate pairs."""
    home = space(tmp_path)
    names = [["a\\u0041\\b.png"], [b"\xff\\.png".decode("utf-8", "surrogateescape")]]
    home.save_table(TaskTable({"task": "t", "split": "s"}, [key(0), key(1)], [0, 1], names))
    found = home.load_table("t", "s")
    assert found.texts == names and "escaped" not in found.header
    assert "escaped" not in home.read_header(home.tables()[0])


def parquet(**columns: Any) -> bytes:
    """A table of 2 rows, sound but for what `columns` and `metadata` change."""
    header = {"kind_of_file": "activation-task-table", "format": 2, "rows": 2, "task": "t", "split": "s"}
    metadata = {"activation": json.dumps(header | columns.pop("header", {}))}
    options = columns.pop("options", {})
    sound = {
        "key": pa.array([bytes.fromhex(key(i)) for i in range(2)], pa.binary(16)),
        "target": pa.array([0, 1], pa.int32()),
        "inputs": pa.array([["a"], ["b"]]),
        "id": pa.nulls(2, pa.string()),
        "meta": pa.nulls(2, pa.string()),
    }
    table = pa.table(sound | columns).replace_schema_metadata(columns.pop("metadata", metadata))
    out = io.BytesIO()
    pq.write_table(table, out, **{"use_dictionary": False, **options})
    return out.getvalue()


def test_what_another_writer_makes_is_read(tmp_path: Path) -> None:
    home = space(tmp_path)
    put(home, parquet(options={"compression": "snappy", "row_group_size": 1}), 2)
    assert home.load_table("t", "s") == TaskTable({"task": "t", "split": "s"}, [key(0), key(1)], [0, 1], [["a"], ["b"]])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "damaged"),
        (b"PAR1" + b"\0" * 100 + b"PAR1", "damaged"),
        (parquet()[:-20], "damaged"),
        (parquet(header={"rows": 3}), "does not match its rows"),
        (parquet(header={"task": "u"}), "another task"),
        (parquet(header={"format": 3}), "install a newer one"),
        (parquet(header={"kind_of_file": "other"}), "does not match"),
        (parquet(key=pa.array([b"short", b"other"])), "columns"),
        (parquet(key=pa.array([b"0" * 16, None], pa.binary(16))), "does not match its rows"),
        (parquet(target=pa.array(["yes", "no"])), "columns"),
        (parquet(target=pa.array([1.0, float("nan")])), "malformed"),
        (parquet(target=pa.array([[0], [None]], pa.list_(pa.int32()))), "malformed"),
        (parquet(inputs=pa.array([["a"], None])), "malformed"),
        (parquet(inputs=pa.array([["a"], ["b", None]])), "malformed"),
        (parquet(meta=pa.array(["{}", "[1]"])), "not a JSON object"),
        (parquet(more=pa.array([1, 2])), "columns"),
        (parquet(options={"use_dictionary": True}), "dictionary"),
        (parquet(inputs=pa.array([["a" * (64 << 20)], ["b"]]), options={"compression": "zstd"}), "unpacks to more"),
    ],
)
def test_damaged_and_hostile_files_are_one_line(tmp_path: Path, data: bytes, words: str) -> None:
    home = space(tmp_path)
    put(home, data, 2)
    with pytest.raises(StoreError, match=words) as caught:
        home.load_table("t", "s")
    assert "\n" not in str(caught.value) and len(home.verify(deep=True)) == 1


def test_format_1_is_read_in_the_words_of_format_2(tmp_path: Path) -> None:
    home = space(tmp_path)
    put_old(home, OLD, [[key(1), 1, ["a"]], [key(2), None, ["b"]]])
    found = home.load_table("t", "s")
    assert (found.keys, found.labels, found.texts) == ([key(1), key(2)], [1, None], [["a"], ["b"]])
    assert found.header["spec"]["target"] == "class" and found.header["spec"]["texts"] == ["0", "1"]
    assert not {"kind", "targets"} & found.header["spec"].keys()
    assert version_of(found.header) == version_of(home.read_header(home.tables()[0])) == OLD_VERSION


def test_an_upgrade_keeps_what_tables_say_and_are_known_by(tmp_path: Path) -> None:
    home = space(tmp_path)
    first = put_old(home, OLD, [[key(1), 1, ["a"]], [key(2), 0, ["\udcff"]]])
    number = {**OLD_SPEC, "kind": "regression", "labels": [], "values": [0, 1]}
    put_old(home, {**OLD, "split": "n", "spec": number}, [[key(1), 5, ["a"]], [key(2), 0.5, ["b"]]])
    broken = put_old(home, {**OLD, "split": "b"}, [[key(1), 0.5, ["a"]]])
    before = {t.split: home.read_table(t) for t in home.tables()}
    assert [(t.split, bool(wrong)) for t, wrong in home.upgrade_tables(change=False)] == [("b", 0), ("n", 0), ("s", 0)]
    assert first.exists()
    assert [(t.split, bool(wrong)) for t, wrong in home.upgrade_tables()] == [("b", True), ("n", False), ("s", False)]
    assert {t.split: home.read_table(t) for t in home.tables()} == before
    assert [p.name[0] for p in first.parent.glob("*.jsonl.gz")] == [broken.name[0]] == ["b"]
    assert version_of(home.load_table("t", "s").header) == OLD_VERSION


def test_a_stopped_upgrade_leaves_one_table_to_readers(tmp_path: Path) -> None:
    home = space(tmp_path)
    path = put_old(home, OLD, [[key(1), 1, ["a"]]])
    kept = shutil.copy(path, tmp_path / path.name)
    home.upgrade_tables()
    shutil.copy(kept, path)
    assert len(home.tables()) == 2 and home.load_table("t", "s").labels == [1]
    assert [wrong for _, wrong in home.upgrade_tables()] == [""] and len(home.tables()) == 1
    assert Store.open(tmp_path / "store").spaces()[0].load_table("t", "s").labels == [1]


def test_a_table_of_several_slots_knows_the_keys_of_the_others(tmp_path: Path) -> None:
    home = space(tmp_path)
    header = {"task": "t", "split": "s", "slot": "image", "slots": {"image": ["file"], "text": ["caption"]}}
    table = TaskTable(header, [key(0), key(0)], [0, 1], [["a"], ["a"]], joined={"text": [key(1), key(2)]})
    path = home.save_table(table)
    assert home.load_table("t", "s") == table and table.take([1]).joined == {"text": [key(2)]}
    assert pq.read_schema(path).names[-1] == "key/text"
    for joined in ({"text": [key(1)]}, {"text": ["x", "y"]}, {"Te/xt": [key(1), key(2)]}):
        with pytest.raises(ValueError, match="keys"):
            home.save_table(TaskTable(header, [key(0), key(0)], [0, 1], joined=joined))
    other = pq.read_table(path)
    for names in (["key/text", "key/text"], ["other"]):
        wrong = other.rename_columns([*other.column_names[:5], names[0]])
        wrong = wrong.append_column(pa.field(names[-1], pa.binary(16), False), other["key/text"])
        wrong = wrong.replace_schema_metadata(other.schema.metadata)
        out = io.BytesIO()
        pq.write_table(wrong, out, use_dictionary=False)
        put(home, out.getvalue(), 2)
        with pytest.raises(StoreError, match="columns"):
            home.load_table("t", "s", path=next(t.path for t in home.tables() if not str(path).endswith(t.path)))
        for extra in [t for t in home.tables() if not str(path).endswith(t.path)]:
            Path(home.files.where(extra.path)).unlink()


def test_keys_of_a_large_table_stand_in_memory_once() -> None:
    n = 200_000
    keys = Keys(*np.random.default_rng(0).integers(0, 1 << 64, (2, n), np.uint64))
    data = dump({}, keys, [1] * n, [[]] * n, [], [], {"text": keys})
    (_, columns), peak = most_memory(lambda: read_rows(data, n, "here"))
    assert columns[0] == keys and columns[5]["text"] == keys and columns[1] == [1] * n
    assert peak < 48 * n  # 40 of them given; 70 with the bytes of all keys beside


def test_keys_within_a_longer_column() -> None:
    many = [bytes([i]) * 16 for i in range(9)]
    column = pa.chunked_array(
        [pa.array(many[:5], pa.binary(16))[2:], pa.array([], pa.binary(16)), pa.array(many[5:], pa.binary(16))]
    )
    assert _keys_of(column) == Keys.of_bytes(b"".join(many[2:]))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted by /proc")
def test_reading_leaves_no_thread_of_arrows_behind(tmp_path: Path) -> None:
    """Such a thread may abort the process when it ends, with all done: apache/arrow#34314."""
    home = space(tmp_path)
    home.save_table(TaskTable({"task": "t", "split": "s"}, [key(n) for n in range(9)], [0] * 9, [["x"]] * 9))
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), tmp_path / "mine.parquet")
    code = (
        "import sys; from pathlib import Path; from pipeline.store import Store\n"
        "from pipeline.extract.tasks.sheet import read_sheet\n"
        "threads = lambda: [p for p in Path('/proc/self/task').iterdir() if 'alloc' not in (p / 'comm').read_text()]\n"
        "before = len(threads())\n"
        "(space,) = Store.open(sys.argv[1]).spaces()\n"
        "table, sheet = space.load_table('t', 's'), read_sheet(Path(sys.argv[2]))\n"
        "print(before, len(threads()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "store"), str(tmp_path / "mine.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert len(set(done.stdout.split())) == 1, done.stdout
