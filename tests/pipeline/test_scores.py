"""Class weights, metrics, reports and stratified splits from the command line: they become part of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipeline
from pipeline import api
from pipeline.extract.tasks import load_task
from pipeline.runs import load_run
from pipeline.store.errors import UserError
from pipeline.train.fit.state import refuse_other_run
from tests import tiny
from tests.pipeline.test_errors import refused
from tests.pipeline.test_errors import run as invoke
from tests.pipeline.test_objectives import run

TRAIN = ["--tuner", "probe", "--epochs", 2, "--batch-size", 16, "--lr", 0.02, "--warmup-steps", 0, "--device", "cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and tables of 60 sentences with three classes (40, 15, 5 rows), several labels, or a number."""
    folder = tmp_path_factory.mktemp("scores")
    tiny.bert(folder / "bert")
    texts = tiny.sentences(60)
    named = ["no"] * 40 + ["yes"] * 15 + ["maybe"] * 5
    (folder / "three.csv").write_text("text,label\n" + "".join(f"{t},{k}\n" for t, k in zip(texts, named, strict=True)))
    rows = [f"{t},{';'.join(w for w in ('a', 'the', 'cat') if w in t.split())}\n" for t in texts]
    (folder / "topics.csv").write_text("text,topics\n" + "".join(rows))
    (folder / "length.csv").write_text("text,label\n" + "".join(f"{t},{len(t) / 10}\n" for t in texts))
    return folder


@pytest.fixture(scope="module")
def three(made: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Options of a store with the three classes, split by classes."""
    options = [
        "--model",
        made / "bert",
        "--task",
        made / "three.csv",
        "--store",
        tmp_path_factory.mktemp("three") / "s",
    ]
    run("extract", *options, "--for", "probe", "--stratify")
    return options


def stored(made: Path, folder: Path, table: str, *columns: object) -> list[Any]:
    options = ["--model", made / "bert", "--task", made / table, *columns, "--store", folder / "store"]
    run("extract", *options, "--for", "probe")
    return options


def kept(folder: Path) -> dict[str, Any]:
    options: dict[str, Any] = yaml.safe_load((folder / "recipe.yaml").read_text())["objective_options"]
    return options


def test_weights_and_metrics_are_part_of_the_run(three: list[Any], tmp_path: Path) -> None:
    own = ["--class-weights", "balanced", "--metric", "f1_macro,roc_auc"]
    trained = run("train", *three, *TRAIN, *own, "--out", tmp_path / "run")
    assert trained["test"].keys() == trained["validation"].keys() == {"f1_macro", "roc_auc"}
    # 32, 12 and 4 training rows of no, yes and maybe, whose names are sorted
    assert kept(tmp_path / "run")["class_weights"] == ["maybe=4.0", "no=0.5", f"yes={48 / 36!r}"]
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    best = max((e for e in log if "validation" in e), key=lambda e: e["validation"]["f1_macro"])
    assert trained["best_epoch"] == best["epoch"]
    scored = run("evaluate", tmp_path / "run", "--split", "test")
    assert {k: scored[k] for k in trained["test"]} == pytest.approx(trained["test"], abs=1e-9)
    # What was counted is what is read back, on fewer rows too; and the weights change the training.
    again = run("train", "--recipe", tmp_path / "run" / "recipe.yaml", "--limit", 20, "--out", tmp_path / "again")
    assert kept(tmp_path / "again") == kept(tmp_path / "run") and again["steps"] < trained["steps"]
    losses = []
    for name, more in (("run", []), ("plain", ["--metric", "f1_macro,roc_auc"])):
        if more:
            run("train", *three, *TRAIN, *more, "--out", tmp_path / name)
        losses.append([json.loads(x).get("loss") for x in (tmp_path / name / "log.jsonl").read_text().splitlines()])
    assert losses[0] != losses[1]


def test_a_resumed_run_keeps_its_options(three: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.train.fit.loop import Interrupted, Training

    made = Training.made

    def stop(self: Any, *given: Any) -> None:
        made(self, *given)
        self.save()
        raise Interrupted("stopped")

    monkeypatch.setattr(Training, "made", stop)
    assert invoke("train", *three, *TRAIN, "--class-weights", "yes=2", "--out", tmp_path / "run").exit_code != 0
    monkeypatch.undo()
    options = [*three, *TRAIN, "--out", tmp_path / "run"]
    refused(invoke("train", *options), "unfinished run", "class_weights", "yes=2.0")
    refused(invoke("train", *options, "--class-weights", "yes=2", "--pooling", "first"), "pooling", "mean", "first")
    assert run("train", *options, "--class-weights", "yes=2")["stopped"] == "done"
    # A checkpoint of an earlier version, or without an option that there is now, goes on.
    now = {"epochs": 2, "chosen": {"objective": "a", "objective_options": {"old": 1, "new": 2}}}
    for saved in ({"epochs": 2}, {"epochs": 2, "chosen": {"objective": "a", "objective_options": {"old": 1}}}):
        refuse_other_run(saved, now, tmp_path)


def test_what_means_nothing_is_refused_before_a_run_is_made(three: list[Any], made: Path, tmp_path: Path) -> None:
    train = ["train", *three, *TRAIN, "--out", tmp_path / "run"]
    refused(invoke(*train, "--class-weights", "perhaps=2"), "no class 'perhaps'", "maybe, no, yes")
    refused(invoke(*train, "--metric", "mse"), "--metric mse", "classification", "f1_macro")
    refused(invoke(*train, "--positive-weights", "balanced"), "--positive-weights", "multilabel")
    compare = ["compare", *three, "--tuners", "probe", "--epochs", 1, "--out", tmp_path / "run"]
    refused(invoke(*compare, "--metric", "nonsense"), "nonsense", "accuracy")
    refused(invoke(*train, "--tier", "disk", "--host-memory", "1GB"), "--host-memory", "--tier disk")
    with pytest.raises(UserError, match="--host-memory"):
        pipeline.open_store(str(three[-1])).stream(task="three", states="encoder.3", tier="host", host_memory="1GB")
    assert not (tmp_path / "run").exists()


def test_reports(three: list[Any], made: Path, tmp_path: Path) -> None:
    run("train", *three, *TRAIN, "--out", tmp_path / "run")
    found = run("evaluate", tmp_path / "run", "--split", "train", "--report")
    report, rows = found["report"], {row["name"]: row for row in found["report"]["rows"]}
    assert {name: rows[name]["support"] for name in ("no", "yes", "maybe")} == {"no": 32, "yes": 12, "maybe": 4}
    assert sum(map(sum, report["confusion"])) == 48 and report["labels"] == ["maybe", "no", "yes"]
    assert rows["micro mean"]["f1"] == pytest.approx(found["accuracy"])
    shown = invoke("evaluate", tmp_path / "run", "--report").stdout
    assert "support" in shown and "is \\ told" in shown and "weighted mean" in shown
    assert load_run(tmp_path / "run").evaluate("test").keys() == {"accuracy", "average"}


def test_reports_of_several_labels_and_of_numbers(made: Path, tmp_path: Path) -> None:
    topics = stored(made, tmp_path / "topics", "topics.csv", "--label", "topics", "--separator", ";")
    own = ["--positive-weights", "balanced", "--metric", "map,hamming_loss"]
    trained = run("train", *topics, *TRAIN, *own, "--out", tmp_path / "several")
    assert trained["test"].keys() == {"map", "hamming_loss"}
    assert [text.split("=")[0] for text in kept(tmp_path / "several")["positive_weights"]] == ["a", "cat", "the"]
    report = run("evaluate", tmp_path / "several", "--split", "train", "--report")["report"]
    assert report["confusion"].keys() == {"a", "cat", "the"}
    assert all(sum(map(sum, cells)) == 48 for cells in report["confusion"].values())
    assert "neither" in invoke("evaluate", tmp_path / "several", "--report").stdout
    numbers = stored(made, tmp_path / "numbers", "length.csv")
    trained = run("train", *numbers, *TRAIN, "--metric", "mae,r2", "--out", tmp_path / "number")
    log = [json.loads(line) for line in (tmp_path / "number" / "log.jsonl").read_text().splitlines()]
    epochs = {e["epoch"]: e["validation"]["mae"] for e in log if "validation" in e}
    assert trained["best_epoch"] == min(epochs, key=lambda e: epochs[e])
    rows = run("evaluate", tmp_path / "number", "--report")["report"]["rows"]
    assert rows[0] == {"residual": "samples", "value": 6} and rows[3]["residual"] == "mean absolute"
    assert rows[3]["value"] == pytest.approx(trained["test"]["mae"], rel=1e-6)
    assert "quantile 0.5" in invoke("evaluate", tmp_path / "number", "--report").stdout


def test_compare_shows_the_metric_that_was_asked_for(made: Path, tmp_path: Path) -> None:
    """Also of tasks whose figures have no average."""
    topics = stored(made, tmp_path, "topics.csv", "--label", "topics", "--separator", ";")
    options = ["compare", *topics, "--tuners", "probe", "--epochs", 1, "--out", tmp_path / "runs"]
    (row,) = run(*options)["rows"]
    assert row["figure"] == "micro_f1"
    shown = invoke(*options, "--metric", "hamming_loss")
    assert shown.exit_code == 0 and "metric: hamming_loss, smaller is better" in shown.stdout


def test_compare_names_the_extraction_of_all_its_methods(made: Path, tmp_path: Path) -> None:
    options = ["--model", made / "bert", "--task", made / "three.csv", "--store", tmp_path / "store"]
    compare = [
        "compare",
        *options,
        "--tuners",
        "probe,lst,sherl,lora",
        "--init",
        "magnitude",
        "--out",
        tmp_path / "runs",
    ]
    pipeline.open_store(tmp_path / "store", create=True)
    line = refused(invoke(*compare), "holds no states", "--for probe,lst,sherl", "--init magnitude")
    run("extract", *options, "--for", "probe")
    assert refused(invoke(*compare), "lst").partition("run:")[2] == line.partition("run:")[2]


# --- stratified splits


@pytest.mark.parametrize(("rows", "held"), [((40, 15, 5), [(4, 2, 0), (4, 1, 1)]), ((10, 9, 1), [(1, 1, 0)] * 2)])
def test_stratified_splits_hold_each_class_in_its_share(
    tmp_path: Path, rows: tuple[int, ...], held: list[tuple[int, ...]]
) -> None:
    names = [name for name, n in zip("abc", rows, strict=True) for _ in range(n)]
    text = "text,label\n" + "".join(f"row {i},{name}\n" for i, name in enumerate(names))
    (tmp_path / "t.csv").write_text(text)
    task, plain = (load_task(str(tmp_path / "t.csv"), stratify=s) for s in (True, False))
    counts = {s: tuple(r.labels.count(c) for c in range(3)) for s, r in task.splits.items()}
    assert [counts["validation"], counts["test"]] == held
    assert sorted(t for r in task.splits.values() for t in r.texts) == sorted((f"row {i}",) for i in range(sum(rows)))
    assert load_task(str(tmp_path / "t.csv"), stratify=True).splits == task.splits
    # The sizes are those of a plain draw, whose version has not changed; the two are different tasks.
    assert {s: len(r) for s, r in task.splits.items()} == {s: len(r) for s, r in plain.splits.items()}
    assert "stratified" not in plain.provenance and task.version != plain.version
    # Rows come in the order of the fixed permutation, so that a --limit is a fair sample of each split.
    order = {t: i for i, t in enumerate(t for s in ("validation", "test", "train") for t in plain.splits[s].texts)}
    assert all([order[t] for t in r.texts] == sorted(order[t] for t in r.texts) for r in task.splits.values())


@pytest.mark.parametrize(
    ("table", "more", "said"),
    [
        ("length.csv", {}, "one class a row; the type of the target here is number"),
        ("topics.csv", {"label": "topics", "separator": ";"}, "the target here is classes"),
        ("three.csv", {"validation": "three.csv"}, "no rows are held out"),
    ],
)
def test_what_cannot_be_stratified_is_refused(made: Path, table: str, more: dict[str, Any], said: str) -> None:
    files = {k: made / v if k == "validation" else v for k, v in more.items()}
    with pytest.raises(UserError, match=said):
        load_task(str(made / table), stratify=True, **files)


def test_stratified_and_plain_splits_never_mix(three: list[Any], made: Path, tmp_path: Path) -> None:
    train = ["train", *three, *TRAIN, "--epochs", 1, "--out"]
    refused(invoke(*train, tmp_path / "run", "--no-stratify"), "with --stratify")
    (tmp_path / "few.csv").write_text("text,label\na,x\nb,y\nc,z\n")
    refused(invoke("extract", *three[:2], "--task", tmp_path / "few.csv", "--stratify"), "too few")
    refused(invoke("extract", *three[:2], "--task", "sst2", "--stratify"), "--stratify", "table of your own")
    both = ["--model", made / "bert", "--task", made / "three.csv", "--store", tmp_path / "store"]
    run("extract", *both, "--for", "probe", "--stratify")
    run("extract", *both, "--for", "probe")
    train = ["train", *both, *TRAIN, "--epochs", 1, "--out"]
    refused(invoke(*train, tmp_path / "run"), "stratified")  # which one it is must be said
    first = run(*train, tmp_path / "one", "--stratify")
    run(*train, tmp_path / "two", "--no-stratify")
    tests = [load_run(tmp_path / name).job.tables["test"] for name in ("one", "two")]
    assert [tests[0].labels.count(c) for c in range(3)] == [0, 4, 2] and tests[0].keys != tests[1].keys
    again = run("train", "--recipe", tmp_path / "one" / "recipe.yaml", "--out", tmp_path / "again")
    assert again["test"] == first["test"]


# --- rows without labels


def test_rows_without_labels_from_the_command_line_and_python(three: list[Any], made: Path, tmp_path: Path) -> None:
    """They are extracted and streamed; a run predicts on them; it says that they cannot be scored."""
    texts = tiny.sentences(30, seed=3)
    (tmp_path / "bare.csv").write_text("id,text\n" + "".join(f"r{i},{t}\n" for i, t in enumerate(texts)))
    store = pipeline.open_store(tmp_path / "store", create=True)
    done = store.extract(str(tmp_path / "bare.csv"), model=str(made / "bert"), tuners=["probe"])
    assert sum(done["rows"].values()) == 30
    batches = [b for s in done["rows"] for b in store.stream(task="bare", split=s, states="encoder.3", batch_size=7)]
    assert sum(len(b) for b in batches) == 30 and all(b.targets is None for b in batches)
    run("train", *three, *TRAIN, "--out", tmp_path / "run")
    told = run("predict", tmp_path / "run", "--input", tmp_path / "bare.csv")["predictions"]
    assert [t["id"] for t in told] == [f"r{i}" for i in range(30)] and {t["label"] for t in told} <= {
        "no",
        "yes",
        "maybe",
    }
    (tmp_path / "new.csv").write_text("text,label\n" + "".join(f"{t},no\n" for t in texts[:20]) + "x,yes\n")
    options = ["--model", made / "bert", "--task", tmp_path / "new.csv", "--store", tmp_path / "store"]
    run("extract", *options, "--test", tmp_path / "bare.csv", "--for", "probe")
    trained = run("train", *options, "--test", tmp_path / "bare.csv", *TRAIN, "--out", tmp_path / "second")
    assert trained["test"] is None
    refused(invoke("evaluate", tmp_path / "second"), "no labels", "predict")


# --- options that would do nothing


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("train", {"tuners": ["probe"]}, "tuners.*option of extract"),
        ("train", {"batch_tokens": 9}, "batch_tokens.*option of extract"),
        ("extract", {"epochs": 3}, "epochs.*option of train"),
        ("extract", {"tier": "disk"}, "tier.*option of train"),
        ("extract", {"blend": "max"}, "blend.*for training"),
        ("extract", {"objective-options": {"metric": ["f1"]}}, "metric.*for training"),
    ],
)
def test_python_refuses_options_of_another_command(
    made: Path, tmp_path: Path, command: str, options: dict[str, Any], said: str
) -> None:
    store = pipeline.open_store(tmp_path / "store", create=True)
    with pytest.raises(UserError, match=rf"{command}\(\): {said}"):
        getattr(store, command)(task=str(made / "three.csv"), model=str(made / "bert"), **options)
    assert store.spaces() == []


def test_a_task_at_hand_is_read_from_no_file(made: Path, tmp_path: Path) -> None:
    task = load_task(str(made / "three.csv"))
    with pytest.raises(UserError, match=r"stratify.*a Task with its rows is given"):
        api.extract(task, model=str(made / "bert"), store=str(tmp_path / "store"), stratify=True)


def test_an_explicit_grid_is_compared_with_the_stored_one(made: Path, tmp_path: Path, shared_data: Path) -> None:
    options = ["--model", made / "bert", "--task", "stsb", "--store", tmp_path / "store"]
    run("extract", *options, "--data", shared_data / "glue", "--limit", 24, "--for", "probe", "--target-step", 0.2)
    train = ["train", *options, *TRAIN, "--out", tmp_path / "run"]
    refused(invoke(*train, "--target-step", 0.1), "--target-step was 0.2, now 0.1")
    assert run(*train)["test"]
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["grid"] == 0.2
