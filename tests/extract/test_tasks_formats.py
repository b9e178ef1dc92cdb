"""Tables in Parquet, without a header, and text datasets of Hugging Face as tasks: rows, refusals, what is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from pipeline.extract.tasks import load_task
from pipeline.extract.tasks.base import Task
from pipeline.recipe import Recipe
from pipeline.store.errors import UserError
from tests.pipeline.test_errors import run

ROWS = [("a cat; asleep", "yes"), ("the dog, awake", "no"), ("one bird", "yes"), ("two birds", "no")] * 10
COLUMNS = {"text": [f"{t} {i}" for i, (t, _) in enumerate(ROWS)], "label": [label for _, label in ROWS]}


def rows_of(task: Task) -> list[Any]:
    return sorted(
        (texts, task.spec.labels[int(label)] if label is not None else None)  # type: ignore[arg-type]
        for rows in task.splits.values()
        for texts, label in zip(rows.texts, rows.labels, strict=True)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("formats")
    (home / "rows.jsonl").write_text(
        "".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in zip(*COLUMNS.values(), strict=True))
    )
    parquet.write_table(pa.table(COLUMNS), home / "rows.parquet")
    bare = "".join(f'"{t}",{c}\n' for t, c in zip(*COLUMNS.values(), strict=True))
    (home / "rows.csv").write_text(bare)
    (home / "dataset").mkdir()
    (home / "dataset" / "train.csv").write_text("text,label\n" + bare)
    return home


def test_all_ways_give_the_same_rows(folder: Path) -> None:
    wanted = load_task(str(folder / "rows.jsonl"))
    for task in (
        load_task(str(folder / "rows.parquet")),
        load_task(str(folder / "rows.csv"), columns=("text", "label")),
        load_task(f"hub:{folder / 'dataset'}"),
    ):
        assert rows_of(task) == rows_of(wanted) and task.spec.labels == ("no", "yes")
        assert {s: r.texts for s, r in task.splits.items()} == {s: r.texts for s, r in wanted.splits.items()}


def test_parquet_has_types(tmp_path: Path) -> None:
    features = {
        "label": {"names": ["neg", "pos"], "_type": "ClassLabel"},
        "text": {"dtype": "string", "_type": "Value"},
    }
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    table = pa.table({"text": ["a", "b", "c", "d"], "label": [0, 1, 1, 0]}).replace_schema_metadata(about)
    parquet.write_table(table, tmp_path / "a.parquet")
    assert load_task(str(tmp_path / "a.parquet")).spec.labels == ("neg", "pos")
    tags = {"words": [["a", "cat"], ["b"], ["c", "d"], ["e"]], "tags": [["D", "N"], ["N"], ["D", "N"], ["D"]]}
    parquet.write_table(pa.table(tags), tmp_path / "t.parquet")
    assert load_task(str(tmp_path / "t.parquet")).spec.target == "tags"
    parquet.write_table(pa.table({"text": ["a", "b", "c"], "label": [0.5, 1.25, float("nan")]}), tmp_path / "n.parquet")
    with pytest.raises(UserError, match=r"row 3 .*no label"):
        load_task(str(tmp_path / "n.parquet"))
    parquet.write_table(table.set_column(1, "label", pa.array([0, 1, 1, 7])), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="none of the 2 classes"):
        load_task(str(tmp_path / "b.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "options", "said"),
    [
        ("x.parquet", b"PAR1 no", {}, "cannot be read as Parquet"),
        ("x.parquet", b"", {}, "empty"),
        ("x.csv", b"a b,yes\nc,no\n", {"columns": ("text",)}, "2 fields where 1"),
        ("x.csv", b"text,label\na,yes\n", {"columns": ("text", "label")}, "leave --columns out"),
        ("x.csv", b"Label,text\nyes,a\n", {"columns": ("text", "label")}, "leave --columns out"),
        ("x.csv", b"a,yes\n", {"columns": ("text", "text")}, "twice"),
        ("x.jsonl", b'{"text": "a"}\n', {"columns": ("text",)}, "have names"),
        ("x.csv", b"a,yes\nb,no\nc,no\n", {"columns": ("one", "two")}, "--text"),
    ],
)
def test_wrong_files_are_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, options: Any, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_task(str(tmp_path / name), **options)


def test_wrong_datasets_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    task = f"hub:{folder / 'dataset'}"
    for options, said in (
        ({"text": "body"}, "no column 'body'"),
        ({"validation": Path("x.csv")}, "--validation"),
        ({"columns": ("a", "b")}, "--columns"),
    ):
        with pytest.raises(UserError, match=said):
            load_task(task, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot fetch"):
        load_task(f"hub:{tmp_path / 'nothing'}")


def test_what_was_extracted_is_what_is_trained_on(folder: Path, checkpoints: Any, tmp_path: Path) -> None:
    """Of a table without a header, and a dataset: by its file, live, and when either has changed since."""
    store = ["--store", tmp_path / "store"]
    bare = ["--model", checkpoints["bert"], "--task", folder / "rows.csv", *store]
    assert run("extract", *bare, "--columns", "text,label", "--for", "probe").exit_code == 0
    train = [*bare, "--tuner", "probe", "--epochs", 1]
    for number, more in enumerate(([], ["--columns", "text,label"], ["--columns", "text,label", "--live"])):
        done = run("train", *train, *more, "--out", tmp_path / f"run{number}", "--json")
        assert done.exit_code == 0, done.output
        assert "columns:\n- text\n- label" in (tmp_path / f"run{number}" / "recipe.yaml").read_text()
    swapped = run("train", *train, "--columns", "label,text", "--out", tmp_path / "x")
    assert swapped.exit_code != 0 and "--columns was text,label" in swapped.stderr
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    text = (folder / "dataset" / "train.csv").read_text()
    (dataset / "train.csv").write_text(text)
    hub = ["--model", checkpoints["bert"], "--task", f"hub:{dataset}", *store]
    assert run("extract", *hub, "--for", "probe").exit_code == 0
    done = run("train", *hub, "--tuner", "probe", "--epochs", 1, "--out", tmp_path / "hub")
    assert done.exit_code == 0, done.output
    scored = run("evaluate", tmp_path / "hub", "--json")
    assert scored.exit_code == 0, scored.output
    (dataset / "train.csv").write_text(text.replace(",yes", ",maybe"))
    changed = run("train", *hub, "--tuner", "probe", "--epochs", 1, "--out", tmp_path / "y")
    assert changed.exit_code != 0 and "has changed" in changed.stderr, changed.output


def test_columns_in_another_order_are_another_task(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("".join(f"a{i},b{i % 2}\n" for i in range(10)))
    one = load_task(str(tmp_path / "t.csv"), columns=("text", "label"))
    other = load_task(str(tmp_path / "t.csv"), columns=("label", "text"))
    assert one.provenance != other.provenance and Recipe(columns=("a",)).columns == ("a",)
