"""Rows that are odd, and limits above what is there: said with counts, never refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline
from pipeline import api
from pipeline.checks.doubtful_rows import doubts
from pipeline.extract.tasks.base import TaskSpec
from pipeline.store import TaskTable
from pipeline.store.errors import Notice
from pipeline.store.format.digest import digest_json
from pipeline.store.tables.parquet import dump, read_rows
from tests import vision
from tests.pipeline.test_errors import run

PLAIN = [(f"film number {i}", str(i // 2 % 2)) for i in range(30)]


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("sentence", "label"), *rows])
    return path


def extracted(model: Path, task: Path, store: Path, *more: object) -> list[str]:
    """The warnings of an extraction."""
    result = run("extract", "--model", model, "--task", task, "--store", store, "--for", "probe", *more)
    assert result.exit_code == 0, result.output
    return warnings_of(result.stderr)


def warnings_of(text: str) -> list[str]:
    return [line.removeprefix("warning: ") for line in text.splitlines() if line.startswith("warning:")]


def test_odd_rows_are_counted_when_extracted_and_when_trained(checkpoints, tmp_path):
    both = [("both ways", str(i % 2)) for i in range(7)]
    rows = [*PLAIN[:25], *[("  ", "0")] * 10, *[("twice the same", "0")] * 8, *both]
    task, store = write(tmp_path / "odd.csv", rows), tmp_path / "store"
    said = extracted(checkpoints["bert"], task, store)
    splits = {t.split: t for s in pipeline.open_store(store).spaces() for t in map(s.read_table, s.tables())}
    texts = {name: [x[0] for x in table.texts] for name, table in splits.items()}
    blank = texts["train"].count("  ")
    assert f"{blank} of 40 train rows have a blank text" in said
    assert [x for x in said if x.startswith("1 of 28 texts stand with two labels, first: 'both ways' as ")]
    for name, before in (("validation", texts["train"]), ("test", texts["train"] + texts["validation"])):
        shared = sum(text in before for text in texts[name])
        (line,) = [x for x in said if x.startswith(f"{shared} of 5 {name} rows stand in train")]
        assert shared and "--validation and --test" in line
    train = ["train", "--task", task, "--store", store, "--tuner", "probe", "--epochs", 1]
    assert warnings_of(run(*train, "--out", tmp_path / "a").stderr) == said
    assert json.loads(run(*train, "--out", tmp_path / "b", "--json").stdout)["warnings"] == said


def test_plain_rows_give_no_word(checkpoints, tmp_path):
    assert extracted(checkpoints["bert"], write(tmp_path / "plain.csv", PLAIN), tmp_path / "store") == []


def test_a_test_file_of_training_rows_is_said_without_blaming_the_split(checkpoints, tmp_path):
    write(tmp_path / "test.csv", [*PLAIN[:4], ("new", "0")])
    task = write(tmp_path / "train.csv", PLAIN)
    (line,) = extracted(checkpoints["bert"], task, tmp_path / "store", "--test", tmp_path / "test.csv")
    assert line.startswith("4 of 5 test rows stand in train or validation too") and "drawn" not in line


def test_two_values_of_one_text_in_a_regression(checkpoints, tmp_path):
    rows = [(f"film number {i}", f"{i / 7:.2f}") for i in range(30)] + [("a film", "1.5"), ("a film", "2.25")]
    said = extracted(checkpoints["bert"], write(tmp_path / "stars.csv", rows), tmp_path / "store")
    (line,) = [x for x in said if "two labels" in x]
    assert "1 of 31 texts" in line and "1.5" in line and "2.25" in line


def test_images_are_compared_by_what_they_show(checkpoints, tmp_path):
    folder = vision.write_folder(tmp_path / "halves")
    one, other = (sorted(p for p in c.iterdir())[0] for c in sorted(folder.iterdir())[:2])
    other.write_bytes(one.read_bytes())
    (line,) = [x for x in extracted(checkpoints["resnet"], folder, tmp_path / "store") if "two labels" in x]
    assert line.startswith("1 of 59 images") and one.parent.name in line and other.parent.name in line


@pytest.mark.parametrize("augment", ["flip", "random"])
def test_views_are_no_images_of_their_own(checkpoints, tmp_path, augment):
    """What is odd is told of the images that were given, with and without views."""
    folder = vision.write_folder(tmp_path / "halves", 40)
    one, other = (sorted(c.iterdir())[0] for c in sorted(folder.iterdir())[:2])
    other.write_bytes(one.read_bytes())
    store = tmp_path / "store"
    plain = extracted(checkpoints["resnet"], folder, store, "--limit", 40)
    several = extracted(checkpoints["resnet"], folder, store, "--limit", 40, "--augment", augment, "--views", 2)
    (line,) = [x for x in several if "two labels" in x]
    assert line.startswith("1 of 39 images") and ".png' as " in line
    assert several == plain
    train = ["train", "--task", folder, "--store", store, "--tuner", "probe", "--epochs", 1, "--views", 2]
    done = run(*train, "--augment", augment, "--out", tmp_path / "run", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["warnings"] == plain


@pytest.fixture(scope="module")
def stored(checkpoints, table, tmp_path_factory) -> list[object]:
    """40 of 96 training rows."""
    store = tmp_path_factory.mktemp("stored") / "store"
    options = ["--model", checkpoints["bert"], "--task", table, "--store", store]
    words = ["--text", "first", "--text-pair", "second", "--label", "label", "--limit", 40, "--for", "probe"]
    assert run("extract", *options, *words).exit_code == 0
    return options


def test_a_limit_above_what_is_stored_is_said(stored, tmp_path):
    train = ["train", *stored, "--tuner", "probe", "--epochs", 1, "--out"]
    above = run(*train, tmp_path / "a", "--limit", 60)
    assert warnings_of(above.stderr) == [
        "--limit 60: the store holds 40 of the 96 train rows, all of them are used; extract with a larger --limit for "
        "more"
    ]
    assert warnings_of(run(*train, tmp_path / "b", "--limit", 40).stderr) == []
    more = ["--tuners", "probe", "--epochs", 1, "--limit", 60, "--out", tmp_path / "c"]
    assert len(warnings_of(run("compare", *stored, *more).stderr)) == 1
    with pytest.warns(Notice, match="holds 40 of the 96 train rows"):
        api.stream(states="encoder.3", task="pairs", store=str(stored[-1]), limit=60)


def test_a_split_of_one_class_or_number_is_said(checkpoints, tmp_path):
    held = write(tmp_path / "held.csv", [(f"new film {i}", "1") for i in range(6)])
    task = write(tmp_path / "train.csv", PLAIN)
    (line,) = extracted(checkpoints["bert"], task, tmp_path / "store", "--validation", held, "--test", task)[:1]
    assert line.startswith("all 6 validation rows are labelled 1: no score on them") and "--stratify" not in line
    done = run("train", "--task", task, "--store", tmp_path / "store", "--tuner", "probe", "--epochs", 1, "--out",
               tmp_path / "run", "--model", checkpoints["bert"])  # fmt: skip
    assert done.exit_code == 0 and line in warnings_of(done.stderr)
    drawn = write(tmp_path / "drawn.csv", [(f"film number {i}", "yes" if i < 1 else "no") for i in range(40)])
    said = extracted(checkpoints["bert"], drawn, tmp_path / "store")
    assert sum("--stratify holds rows of each class out" in line for line in said) >= 1
    numbers = write(tmp_path / "stars.csv", [(f"film number {i}", f"{i / 8}") for i in range(30)])
    still = write(tmp_path / "still.csv", [(f"new film {i}", "2.5") for i in range(6)])
    (line,) = extracted(checkpoints["bert"], numbers, tmp_path / "store", "--validation", still, "--test", numbers)[:1]
    assert line.startswith("all 6 validation rows are labelled 2.5: no score on them")


WORDS = st.sampled_from(["a film", "a film ", "  ", "", "a\\film", "one", "two", "\u3000", "\ud800"])
SPLITS = st.lists(st.tuples(WORDS, WORDS, st.sampled_from([0, 1, None])), max_size=8)


def test_rows_of_another_split_alone_give_no_word():
    header = {"task": "t", "split": "pool", "spec": TaskSpec("t", "none", (), (), ("a",), "{0}").to_dict()}
    assert doubts({"pool": TaskTable(header, ["0" * 32], [None], [["  "]])}) == []


@settings(deadline=None)
@given(st.tuples(SPLITS, SPLITS, SPLITS), st.booleans(), st.sampled_from(["class", "number", "classes", "none"]))
def test_columns_of_texts_and_of_keys_are_doubted_as_lists_are(splits, images, target):
    """What a store's tables say of themselves, in Arrow's memory, and the same rows in lists."""
    names = ("x", "y") if target in ("class", "classes") else ()
    values, answers = ((0.0, 1.0), ("0", "1")) if target == "number" else ((), names if target == "class" else ())
    spec = TaskSpec("t", target, names, (), ("a", "b"), "{0} {1}", answers, values).to_dict()
    listed, stored = {}, {}
    for name, rows in zip(("train", "validation", "test"), splits, strict=True):
        header = {"task": "t", "split": name, "spec": spec}
        labels = [None if n is None or target == "none" else [n] if target == "classes" else n for _, _, n in rows]
        texts = [[a, b] for a, b, _ in rows]
        keys = [digest_json([a, n]) for a, _, n in rows]
        listed[name] = TaskTable(header, keys, labels, texts)
        data = dump(header, keys, labels, texts, [], [], {})
        read, (own, targets, column, *_) = read_rows(data, len(rows), "here")
        stored[name] = TaskTable(read, own, targets, column)
    told = doubts(listed, images)
    assert doubts(stored, images) == told
    if not images:
        blank = [sum(not a.strip() or not b.strip() for a, b, _ in rows) for rows in splits]
        assert [int(s.split()[0]) for s in told if "blank" in s] == [n for n in blank if n]
        seen, both = [{(a, b) for a, b, _ in rows} for rows in splits], 0
        shared = [sum((a, b) in seen[0] for a, b, _ in splits[1])]
        shared += [sum((a, b) in seen[0] | seen[1] for a, b, _ in splits[2])]
        assert [int(s.split()[0]) for s in told if "too, first" in s] == [n for n in shared if n]
        if target != "none":
            given = {}
            for a, b, n in (row for rows in splits for row in rows):
                given.setdefault((a, b), set()).add(n)
            both = sum(len(labels - {None}) > 1 for labels in given.values())
        assert [int(s.split()[0]) for s in told if "two labels" in s] == [both] * (both > 0)


def test_a_blank_text_to_predict_is_said(checkpoints, tmp_path):
    task, store = write(tmp_path / "plain.csv", PLAIN), tmp_path / "store"
    extracted(checkpoints["bert"], task, store)
    made = run("train", "--task", task, "--store", store, "--tuner", "probe", "--epochs", 1, "--out", tmp_path / "run",
               "--model", checkpoints["bert"])  # fmt: skip
    assert made.exit_code == 0, made.output
    done = run("predict", tmp_path / "run", "--input", write(tmp_path / "new.csv", [("a film", "0"), (" ", "1")]))
    assert done.exit_code == 0 and warnings_of(done.stderr) == ["1 of 2 rows have a blank text"]
