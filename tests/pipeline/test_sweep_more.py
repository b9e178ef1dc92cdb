"""Searches, losers that stop early, folds and refits: what is drawn, what goes on after a stop, what is refused."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from pipeline.commands.grid import Range, Sweep, parse_grid, trials
from pipeline.commands.lr_range import reading
from pipeline.commands.sweep_table import summary
from pipeline.jobs.job import load_job
from pipeline.recipe import Recipe, read_recipe
from pipeline.report.facts import read_runs, settings_of, sweep_rows
from pipeline.store import UserError
from pipeline.train.fit.loop import Training
from tests.pipeline.test_errors import run
from tests.pipeline.test_sweep import Killed, assert_same_course, bert, course, swept  # noqa: F401


def killed_after(count: int, monkeypatch: Any, words: list[Any]) -> None:
    """Run the sweep, which is killed after so many steps of its runs."""
    real, calls = Training.made, []

    def made(self: Any, *given: Any) -> None:
        calls.append(1)
        if len(calls) > count:
            raise Killed
        real(self, *given)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Training, "made", made)
        run("sweep", *words)


def test_a_search_draws_in_rounds_and_goes_on(bert, tmp_path, monkeypatch):  # noqa: F811
    words = [*bert, "--tuner", "probe", "--grid", "lr=1e-4..1e-1:log", "--grid", "pooling=mean,first"]
    words += ["--search", "tpe", "--trials", 5, "--round", 2, "--seeds", "0,1"]
    whole = swept(*words, "--out", tmp_path / "whole")
    assert len(whole["settings"]) == 5 and len(whole["runs"]) == 10
    drawn = [row["setting"]["lr"] for row in whole["runs"]]
    assert all(1e-4 <= lr <= 1e-1 and float(f"{lr:.4g}") == lr for lr in drawn) and len(set(drawn)) > 3
    assert whole["best"]["label"] in {s["label"] for s in whole["settings"]}
    killed_after(50, monkeypatch, [*words, "--out", tmp_path / "cut"])  # in the second round
    points = json.loads((tmp_path / "cut" / "search.json").read_text())["points"]
    assert len(points) == 4
    again = swept(*words, "--out", tmp_path / "cut")
    assert [row["setting"] for row in again["runs"]] == [row["setting"] for row in whole["runs"]]
    assert [row["test"] for row in again["runs"]] == [row["test"] for row in whole["runs"]]
    # Further trials stand beside these; another space in the same folder is refused.
    more = swept(*words, "--trials", 6, "--out", tmp_path / "cut")
    assert more["runs"][:10] == again["runs"] and len(more["settings"]) == 6
    other = run("sweep", *words, "--grid", "weight_decay=0..1", "--out", tmp_path / "cut")
    assert other.exit_code != 0 and "another search" in other.stderr


def test_losers_stop_early_and_are_not_the_best(bert, tmp_path, monkeypatch):  # noqa: F811
    words = [*bert, "--tuner", "probe", "--grid", "lr=1e-6,1e-5,1e-2,1e-3", "--epochs", 4, "--halving", 2]
    table = swept(*words, "--out", tmp_path / "whole")
    ends = sorted((row["epochs"], row["stopped"]) for row in table["runs"])
    assert ends == [(1, "halving"), (1, "halving"), (2, "halving"), (4, "done")]
    best = next(row for row in table["runs"] if row["run"] == table["best"]["run"])
    assert best["stopped"] == "done"
    for row in table["runs"]:  # the beginning of what it would be alone
        if row["epochs"] == 2:
            alone = run(*shlex.split(row["command"])[1:])
            assert alone.exit_code == 0, alone.output
            whole = [line for line in course(f"{row['run']}-alone") if line["epoch"] <= 2 and "test" not in line]
            assert [x.get("loss") for x in course(row["run"]) if "test" not in x] == pytest.approx(
                [x.get("loss") for x in whole], abs=1e-5
            )
    killed_after(30, monkeypatch, [*words, "--out", tmp_path / "cut"])
    again = swept(*words, "--out", tmp_path / "cut")
    assert [(r["epochs"], r["dev"]) for r in again["runs"]] == [(r["epochs"], r["dev"]) for r in table["runs"]]
    for changed, said in (
        (["--grid", "pooling=mean,first"], "holds another sweep"),
        (["--halving", 2, "--folds", 3], "leave --folds"),
        (["--halving", 1], "from 2 on"),
        (["--halving", 3], "holds a sweep of --halving 2"),
        (["--halving", 2, "--max-steps", 3], "--max-steps"),
    ):
        refused = run("sweep", *words, *changed, "--out", tmp_path / "cut")
        assert refused.exit_code != 0 and said in refused.stderr, said
    plain = run("sweep", *words[:-2], "--out", tmp_path / "cut")  # a loser's run is not a whole one
    assert plain.exit_code != 0 and "loser" in plain.stderr


def test_folds_cut_the_rows_anew(bert, tmp_path):  # noqa: F811
    words = [*bert, "--tuner", "probe", "--grid", "lr=1e-3,1e-2", "--folds", 3]
    table = swept(*words, "--out", tmp_path / "sweep")
    assert [row["fold"] for row in table["runs"]] == ["1/3", "2/3", "3/3"] * 2
    assert all("-f1of3" in row["name"] or row["fold"] != "1/3" for row in table["runs"])
    assert len({row["run"] for row in table["runs"]}) == 6
    assert [s["seeds"] for s in table["settings"]] == [3, 3]
    assert table["differences"][0]["dev"]["seeds"] == 3  # paired by fold
    row = table["runs"][1]
    alone = run(*shlex.split(row["command"])[1:], "--json")
    assert alone.exit_code == 0, alone.output
    assert_same_course(row["run"], f"{row['run']}-alone")
    assert json.loads(run("evaluate", row["run"], "--split", "validation", "--json").stdout)["accuracy"] == row["dev"]
    recipe = Recipe(model=str(bert[1]), task=str(bert[3]), store=str(bert[5]), tuner="probe")
    plain, held = load_job(recipe).tables, []
    for i in (1, 2, 3):
        own = load_job(Recipe(**{**vars(recipe), "fold": f"{i}/3"})).tables
        train, dev = set(own["train"].keys), set(own["validation"].keys)
        assert not train & dev and train | dev == {*plain["train"].keys, *plain["validation"].keys}
        assert list(own["test"].keys) == list(plain["test"].keys)
        held += sorted(dev)
    assert len(held) == len(set(held))
    # A stopped run of one fold is not gone on with on another.
    for fold, said in (("4/3", "I/K"), ("x", "I/K"), ("1/1", "I/K"), ("1/9999", "fewer than parts")):
        refused = run("train", *bert, "--tuner", "probe", "--fold", fold, "--out", tmp_path / "x")
        assert refused.exit_code != 0 and said in refused.stderr


def test_a_report_keeps_folds_and_other_sweeps_apart(bert, tmp_path):  # noqa: F811
    words, rows = [*bert, "--tuner", "probe", "--grid", "lr=1e-2", "--seeds", "0,1"], dict[Path, Any]()
    for name, more in (("plain", []), ("folds", ["--folds", 2]), ("few", ["--limit", 20])):
        swept(*words, *more, "--out", tmp_path / name)
        rows |= sweep_rows(tmp_path / name)
    told = {s.label: len(s.runs) for s in settings_of(read_runs(list(rows), rows))}
    assert told == {"probe lr=0.01": 2, "probe lr=0.01 folds=2": 4, "probe lr=0.01 limit=20": 2}


def test_the_best_is_refitted_on_all_rows(bert, tmp_path, monkeypatch):  # noqa: F811
    words = [*bert, "--tuner", "probe", "--grid", "lr=1e-3,1e-2,1e30", "--clip", 0, "--seeds", "0,1", "--refit"]
    table = swept(*words, "--out", tmp_path / "whole")
    again = table["refit"]
    recipe = read_recipe(Path(again["run"]) / "recipe.yaml")
    assert recipe["fold"] == "all" and again["test"] and again["dev"] is None and "1e+30" not in again["label"]
    job = load_job(Recipe(model=str(bert[1]), task=str(bert[3]), store=str(bert[5]), tuner="probe", fold="all"))
    assert "validation" not in job.tables
    alone = run(*shlex.split(again["command"])[1:], "--json")
    assert alone.exit_code == 0, alone.output
    assert json.loads(alone.stdout)["test"] == again["test"]
    assert all(row["name"] != again["name"] for row in table["runs"])
    steps = sum(row["steps"] or 0 for row in table["runs"])
    # A diverged run makes a step or two.
    killed_after(steps + 4, monkeypatch, [*words, "--out", tmp_path / "cut"])
    assert "refit" not in json.loads((tmp_path / "cut" / "sweep.json").read_text())
    assert swept(*words, "--out", tmp_path / "cut")["refit"]["test"] == again["test"]


def test_a_range_test_tells_where_the_loss_falls(bert, tmp_path):  # noqa: F811
    words = [
        *bert,
        "--tuner",
        "probe",
        "--epochs",
        6,
        "--batch-size",
        8,
        "--seeds",
        "0,1",
        "--lr-range",
        10,
        "--clip",
        0,
    ]
    table = swept(*words, "--out", tmp_path)
    found = table["lr_range"]["probe"]
    assert 1e-4 <= found["steepest"] < found["lowest"] <= 10
    rates = [line["lr"] for line in course(table["runs"][0]["run"]) if "loss" in line]
    assert rates[0] == pytest.approx(1e-4) and rates == sorted(rates) and len(rates) == 72
    ratios = [b / a for a, b in itertools.pairwise(rates)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    line = [(10 ** (-4 + i / 20), 1.0 if i < 40 else 1 - (i - 40) / 20 if i < 55 else 5.0) for i in range(80)]
    told = reading(line)
    assert told is not None and 1e-2 < told["steepest"] < 10**-1.2 and told["lowest"] == pytest.approx(10**-1.3)
    assert reading(line[:9]) is None and reading([(10**i, float(i)) for i in range(20)]) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lr-range", 1, "--folds", 3], "leave searches"),
        (["--lr-range", 1, "--grid", "lr=1,2"], "lr out"),
        (["--grid", "lr=1e-4..1e-2"], "--search"),
        (["--grid", "lr=1e-2..1e-4", "--search", "tpe"], "below"),
        (["--grid", "lr=0..1:log", "--search", "tpe"], "above 0"),
        (["--grid", "lr=1..2:exp", "--search", "tpe"], "LOW..HIGH"),
        (["--grid", "schedule=a..b", "--search", "tpe"], "no range"),
        (["--search", "tpe"], "nothing to draw"),
        (["--lr-range", 1, "--lr", 0.1, "--schedule", "cosine"], "leave --lr, --schedule out"),
        (["--trials", 3], "--search"),
        (["--trials", 0], "--search"),
        (["--grid", "lr=1..2", "--search", "tpe", "--trials", 0], "at least 1"),
        (["--folds", 1], "at least 2"),
        (["--folds", 3, "--fold", "1/3"], "--fold"),
        (["--grid", "fold=1/3,2/3"], "does not vary fold"),
    ],
)
def test_wrong_searches_are_refused_in_one_line(bert, tmp_path, words, said):  # noqa: F811
    done = run("sweep", *bert, "--tuner", "probe", *words, "--out", tmp_path / "sweep")
    assert done.exit_code != 0 and said in done.stderr and "Traceback" not in done.output
    assert not (tmp_path / "sweep").exists()


def test_ranges_are_read_and_figures_without_a_value_are_no_best():
    assert parse_grid(["lr=1e-4..1e-2:log", "reduction=2..8"]) == {
        "lr": Range(1e-4, 1e-2, True),
        "reduction": Range(2, 8),
    }
    with pytest.raises(UserError, match="--search"):
        trials(Sweep({"lr": Range(1, 2)}, tuners=["lst"]), Recipe(task="x"))
    rows: list[dict[str, Any]] = [
        {"label": label, "seed": 0, "fold": None, "dev": dev, "score": dev, "status": "done", "figure": "average",
         "setting": {}, "trainable_parameters": 1, "seconds_per_epoch": 1.0, "run": label, "stopped": stopped}
        for label, dev, stopped in (("nan", None, "done"), ("lost", 0.9, "halving"), ("kept", 0.5, "done"))
    ]  # fmt: skip
    assert summary(rows)["best"]["label"] == "kept"
