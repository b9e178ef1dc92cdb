"""A user's own table as a task: formats, splits, label order, text-to-text defaults, one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.extract.tasks import canonical_name, load_task
from pipeline.extract.tasks.table import regression_grid
from pipeline.store.errors import UserError


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def csv(rows: int, label: str = "{i}") -> str:
    return "text,label\n" + "".join(f"row {i},{label.format(i=i % 2)}\n" for i in range(rows))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'premise,id,gold\n"a, ""quoted""\nline",1,yes\nb;c,2,no\n\nd,3,yes\n'),
        ("t.csv", '\ufeffpremise;id;gold\r\n"a, ""quoted""\nline";1;yes\r\n"b;c";2;no\r\nd;3;yes\r\n'),
        (
            "t.json",
            json.dumps(
                [
                    {"premise": 'a, "quoted"\nline', "id": 1, "gold": "yes"},
                    {"premise": "b;c", "id": 2, "gold": "no"},
                    {"premise": "d", "id": 3, "gold": "yes"},
                ]
            ),
        ),
        (
            "t.jsonl",
            '{"premise": "a, \\"quoted\\"\\nline", "gold": "yes", "id": 1}\n'
            '{"premise": "b;c", "gold": "no", "id": 2}\n\n{"premise": "d", "gold": "yes", "id": 3}\n',
        ),
    ],
)
def test_formats_give_the_same_rows(name: str, text: str, tmp_path: Path) -> None:
    task = load_task(write(tmp_path / name, text), text="premise", text_pair="id", label="gold")
    rows = [pair for split in task.splits.values() for pair in zip(split.texts, split.labels, strict=True)]
    assert sorted(rows) == [(('a, "quoted"\nline', "1"), 1), (("b;c", "2"), 0), (("d", "3"), 1)]
    assert task.spec.labels == ("no", "yes") and task.spec.texts == ("0", "1")
    assert task.spec.source(("x {0}", "y")) == "t premise: x {0} id: y"
    assert task.provenance["dataset"] == name and str(tmp_path) not in str(task.provenance)


def test_tsv_has_no_quoting(tmp_path: Path) -> None:
    text = 'text\tlabel\n"open\t0\nunder\u2028line\x85\t1\r\nb\t0\n'
    task = load_task(write(tmp_path / "t.tsv", text))
    assert sorted(t for split in task.splits.values() for (t,) in split.texts) == ['"open', "b", "under\u2028line\x85"]


def test_split_is_fixed_and_disjoint(tmp_path: Path) -> None:
    task = load_task(write(tmp_path / "t.csv", csv(95)))
    assert {s: len(r) for s, r in task.splits.items()} == {"train": 77, "validation": 9, "test": 9}
    texts = [t for r in task.splits.values() for t in r.texts]
    assert len(set(texts)) == 95
    assert load_task(str(tmp_path / "t.csv")).splits == task.splits
    assert task.rows("train").texts != sorted(task.rows("train").texts, key=lambda t: int(t[0].split()[1]))


def test_separate_files(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", csv(20))
    more = Path(write(tmp_path / "v.csv", csv(6)))
    bare = Path(write(tmp_path / "bare.jsonl", '{"text": "new"}\n'))
    both = load_task(table, validation=more, test=bare)
    assert {s: len(r) for s, r in both.splits.items()} == {"train": 20, "validation": 6, "test": 1}
    assert both.rows("test").labels == [None] and not both.rows("test").labelled()
    assert both.rows("validation").texts[0] == ("row 0",)  # a given file keeps its order
    assert both.provenance["revision"] != load_task(table).provenance["revision"]
    assert len(load_task(table, test=more).rows("validation")) == 2
    only = load_task(table, validation=more)
    assert len(only.rows("train")) == 20
    with pytest.raises(UserError, match=r"no test rows: .* give one with --test FILE"):
        only.rows("test")


def test_label_order_is_by_value_for_whole_numbers(tmp_path: Path) -> None:
    numbers = "text,label\n" + "".join(f"{i},{i}\n" for i in (10, 9, 2, -1))
    assert load_task(write(tmp_path / "n.csv", numbers)).spec.labels == ("-1", "2", "9", "10")


def test_regression(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", "text,label\n" + "".join(f"r{i},{i / 4}\n" for i in range(1, 20)))
    task = load_task(table)
    assert task.spec.target == "number" and task.spec.metrics == ("pearson", "spearman") and task.spec.labels == ()
    assert task.spec.texts[0] == "0.2" and task.spec.texts[-1] == "4.8" and len(task.spec.texts) == 47
    assert task.spec.texts[task.spec.target_index(3.0)] == "3.0"
    assert load_task(table, targets=("class",)).spec.target == "class"
    whole = write(tmp_path / "w.csv", "text,label\na,1\nb,200\nc,30\n")
    assert load_task(whole).spec.target == "class"
    assert load_task(whole, targets=("number",)).spec.target == "number"


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_grid_covers_the_range(low: float, span: float) -> None:
    high = low + span
    values, targets = regression_grid(low, high)
    step = values[1] - values[0]
    assert 2 <= len(values) <= 51 and len(set(targets)) == len(targets)
    assert values[0] <= low + 1e-6 * step and values[-1] >= high - 1e-6 * step
    assert values[0] > low - 1.001 * step and values[-1] < high + 1.001 * step


def test_names(tmp_path: Path) -> None:
    assert canonical_name("a b/my data.csv") == "my-data" and canonical_name("SST-2") == "sst2"
    assert canonical_name("rte.tsv") == "rte-table"
    assert load_task(write(tmp_path / "rte.csv", csv(9))).spec.name == "rte-table"
    assert load_task(str(tmp_path / "rte.csv"), task_name="mine").spec.name == "mine"
    assert load_task("rte.csv", tmp_path).spec.name == "rte-table"
    assert canonical_name("demo") == "demo"
    with pytest.raises(UserError, match="unknown task 'mnil'; did you mean mnli"):
        load_task("mnil")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "t.csv is empty"),
        ("\n \n", {}, "t.csv is empty"),
        ("text,label\n", {}, "a header but no rows"),
        ("a,b\n1,2\n", {}, "name a column with --text; columns there: a, b"),
        ("text,b\n1,2\n", {"targets": ("class",)}, "name a column with --label; columns there: text, b"),
        (csv(9), {"text": "body"}, "no column 'body'; columns there: text, label"),
        (csv(9), {"text_pair": "body"}, "no column 'body'; columns there: text, label"),
        ("text,text,label\n" + "a,b,0\na,b,1\n" * 5, {}, "2 columns are named 'text'"),
        ("text,label\na,0\nb\nc,1\n", {}, "line 3: 1 fields where 2 are expected"),
        ("text,label\na,0\nb,1,2\n", {}, "line 3: 3 fields where 2 are expected"),
        ('text,label\na,0\n"open,1\n', {}, "unexpected end of data; check the quotes"),
        ("text,label\na,0\nb,\nc,1\n", {}, r"row 2 \(line 3\): no label in column 'label'"),
        (csv(9, "same"), {}, "holds a single class, 'same'"),
        ("text,label\na,0\nb,1\n", {}, "2 rows, too few to hold any out"),
        ("text,label\na,1.5\nb,nan\nc,2\n", {}, r"row 2 \(line 3\): label 'nan' is not a finite number"),
        ("text,label\na,1.5\nb,x\nc,2\n", {"targets": ("number",)}, "label 'x' is not a finite number"),
        (csv(9, "1.5"), {}, "every regression label is 1.5"),
        (csv(9), {"targets": ("classes",)}, "say what parts several ones: --separator"),
        (b"text,label\n\xef\xbb\xbfa,0\nb\xe9,1\n", {}, r"not UTF-8: byte 0xe9 at offset 19 \(line 3\)"),
        ("\ufefftext,label\na,0\n".encode() + b"b\xe9,1\n", {}, r"not UTF-8: byte 0xe9 at offset 19 \(line 3\)"),
    ],
)
def test_bad_tables(text: str | bytes, options: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_task(write(tmp_path / "t.csv", text), **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": null, "label": 0}\n{"text": "b", "label": 1}\n', r"row 1 \(line 1\): 'text' is missing, not text"),
        ('{"text": [1], "label": 0}\n{"text": "b", "label": 1}\n', "'text' is list, not text"),
        ('{"text": "a", "label": {}}\n', "a label must be text or a number, not dict"),
        ('{"text": "a"}\n{"text": "b", "label": 1}\n', r"row 1 \(line 1\): no label"),
        ('{"text": "a", "label": 1}\n{"text": \n', "line 2: not valid JSON"),
        ("7\n", "a JSON object is expected, not int"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_json(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_task(write(tmp_path / "t.jsonl", text))
    assert "\n" not in str(caught.value)


def test_bad_other_files(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", csv(20))
    odd = Path(write(tmp_path / "v.csv", "text,label\na,0\nb,maybe\n"))
    with pytest.raises(UserError, match=r"v.csv, row 2 \(line 3\): unknown label 'maybe'; .*training rows: 0, 1"):
        load_task(table, test=odd)
    bare = Path(write(tmp_path / "b.csv", "text\na\n"))
    with pytest.raises(UserError, match=r"b\.csv: no column 'label'; columns there: text"):
        load_task(table, validation=bare)
    with pytest.raises(UserError, match=r"no such file: .*gone.csv"):
        load_task(str(tmp_path / "gone.csv"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*folder.csv: Is a directory"):
        load_task(str(tmp_path / "folder.csv"))


@given(st.binary(max_size=200))
def test_any_bytes_give_rows_or_one_line(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    for suffix in ("csv", "tsv", "jsonl", "json"):
        path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
        path.write_bytes(b"text\tlabel\n" * (suffix == "tsv") + raw)
        try:
            load_task(str(path))
        except UserError as error:
            assert str(error)
