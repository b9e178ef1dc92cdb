"""Labels that are not what they seem: refused where they mean nothing, said where they may be meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.checks.doubtful_rows import doubts
from pipeline.extract.tasks import load_task
from pipeline.extract.tasks.base import TaskSpec
from pipeline.owners import recipe_of
from pipeline.runs import read_inputs
from pipeline.store import TaskTable
from pipeline.store.errors import UserError
from pipeline.terminal import scores_text


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def said(target: Any, labels: tuple[str, ...], rows: list[Any]) -> list[str]:
    texts = ("0", "1", "2", "3")[: len(labels)] if target == "class" else ()
    spec = TaskSpec("t", target, labels, ("accuracy",), ("text",), "{0}", texts)
    header = {"task": "t", "split": "train", "spec": spec.to_dict()}
    return doubts(
        {
            "train": TaskTable(
                header, [f"{i:032x}" for i in range(len(rows))], rows, [[f"r{i}"] for i in range(len(rows))]
            )
        }
    )


@pytest.mark.parametrize(
    "pair", [("yes", " yes"), ("no", "no "), ("No", "no"), ("1", "1.0"), ("New York", "New  york")]
)
def test_labels_that_differ_in_form_only_are_said(pair: tuple[str, str]) -> None:
    (sentence,) = said("class", (*pair, "other"), [0, 1, 2])
    assert repr(pair[0]) in sentence and repr(pair[1]) in sentence
    assert said("class", (pair[0], "other"), [0, 1]) == []


def test_labels_of_another_kind_are_said() -> None:
    assert "decimal point" in said("class", ("0,5", "1,5"), [0, 1])[0]
    assert "no tag is called O" in said("tags", ("0", "1"), [[0, 1], [1]])[0]
    assert said("tags", ("B-X", "O"), [[0, 1], [1]]) == []
    assert "separator" in said("classes", ("a|b", "c"), [[0], [1], []])[0]
    assert said("classes", ("a", "b"), [[0, 1], []]) == []


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([["a"], "b c", ["b"]], {}, r"row 2 \(line 2\): 'label' is 'b c', in other rows a list"),
        ([["a;b"], ["a"], []], {"separator": ";"}, "--separator parts labels within a text"),
        ([["a", None], ["a"], []], {}, r"row 1 \(line 1\): a label in 'label' is empty"),
        ([["a", ["b"]], ["a"], []], {}, "a label must be text or a number, not list"),
        ([0.5, float("nan"), 1.5], {}, r"row 2 .*'nan' is not a finite number"),
        (["a", None, "b"], {}, r"row 2 \(line 2\): no label"),
    ],
)
def test_labels_that_mean_nothing_are_refused(
    tmp_path: Path, labels: list[Any], options: dict[str, Any], message: str
) -> None:
    file = lines(tmp_path / "t.jsonl", [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)])
    with pytest.raises(UserError, match=message):
        load_task(file, **options)


def test_tags_must_fit_their_words(tmp_path: Path) -> None:
    rows = [{"words": ["a", "b"], "tags": ["O", "B-X"]}, {"words": ["a", "b"], "tags": ["O"]}]
    with pytest.raises(UserError, match=r"row 2 \(line 2\): 1 tags for 2 words"):
        load_task(lines(tmp_path / "t.jsonl", rows))
    new = lines(tmp_path / "new.jsonl", [{"words": ["a"], "tags": ["B-NEW"]}])
    rows[1]["tags"] = ["O", "O"]
    with pytest.raises(UserError, match="unknown label 'B-NEW'; labels of the training rows: B-X, O"):
        load_task(lines(tmp_path / "t.jsonl", rows), validation=Path(new))


def test_line_ends_of_conll_files(tmp_path: Path) -> None:
    text = "a\tO\nb\tB-X\n\nc\tO\n\nd\tB-X\n"
    tasks = []
    for name, end in (("unix", "\n"), ("windows", "\r\n")):
        (tmp_path / f"{name}.conll").write_bytes(text.replace("\n", end).encode())
        tasks.append(load_task(str(tmp_path / f"{name}.conll")))
    assert tasks[0].splits == tasks[1].splits and tasks[0].spec.labels == tasks[1].spec.labels == ("B-X", "O")
    (tmp_path / "mac.conll").write_bytes(text.replace("\n", "\r").encode())
    with pytest.raises(UserError, match="carriage return"):
        load_task(str(tmp_path / "mac.conll"))


def test_inputs_are_read_by_column_and_always_have_an_id(tmp_path: Path) -> None:
    spec = TaskSpec("t", "class", ("no", "yes"), ("accuracy",), ("a", "b"), "{0} {1}", ("0", "1"))
    (tmp_path / "new.csv").write_text("label,b,id,a\nyes,second,mine,first\n,2nd,,1st\n")
    assert read_inputs(tmp_path / "new.csv", spec) == (["mine", 2], [("first", "second"), ("1st", "2nd")])
    rows = [{"a": "x", "b": "y", "id": 0}, {"a": "x", "b": "y"}]
    assert read_inputs(Path(lines(tmp_path / "new.jsonl", rows)), spec)[0] == [0, 2]


def test_an_option_stands_once_in_a_recipe() -> None:
    with pytest.raises(UserError, match="r: --pooling is given twice, by itself and in objective_options"):
        recipe_of("train", ("r", {"tuner": "probe", "pooling": "first", "objective_options": {"pooling": "mean"}}))
    line = ("line", {"objective_options": {"pooling": "mean"}})
    assert (
        recipe_of("train", ("r", {"tuner": "probe", "pooling": "first"}), line).objective_options["pooling"] == "mean"
    )


def test_an_undefined_figure_is_said() -> None:
    assert scores_text({"split": "test", "roc_auc": float("nan"), "f1": 0.5}) == "test: roc_auc undefined  f1 0.5000"
