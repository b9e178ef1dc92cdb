"""A sweep: runs that share each batch are what they are alone, go on after a kill, and stand in one table."""

from __future__ import annotations

import csv
import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest

from pipeline import catalog
from pipeline.commands.grid import Sweep, parse_grid, read_sweep, trials
from pipeline.commands.sweep_table import difference, summary
from pipeline.recipe import Recipe
from pipeline.store import UserError
from pipeline.train.baselines.methods import BASELINES
from pipeline.train.data.store_source import StoreSource
from pipeline.train.fit.loop import Training
from pipeline.train.fit.stack import Stack
from tests.pipeline.test_errors import refused, run

WORDS = ["--text", "first", "--text-pair", "second", "--label", "label"]


@pytest.fixture(scope="module", params=["bert", "t5"])
def options(request, checkpoints, table, tmp_path_factory) -> list[Any]:
    found = ["--model", checkpoints[request.param], "--task", table]
    found += ["--store", tmp_path_factory.mktemp(request.param) / "store"]
    assert run("extract", *found, *WORDS, "--for", "lst,probe,sherl", "--insert", "last").exit_code == 0
    return found


@pytest.fixture(scope="module")
def bert(checkpoints, table, tmp_path_factory) -> list[Any]:
    found = ["--model", checkpoints["bert"], "--task", table, "--store", tmp_path_factory.mktemp("sweep") / "store"]
    assert run("extract", *found, *WORDS, "--for", "lst,probe").exit_code == 0
    return [*found, "--epochs", 2, "--batch-size", 16]


def course(folder: str | Path) -> list[dict[str, Any]]:
    """The log without its times."""
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in lines]


def assert_same_course(one: str | Path, other: str | Path) -> None:
    """Loss for loss, to the rounding of a stack."""
    for a, b in zip(course(one), course(other), strict=True):
        assert a.keys() == b.keys()
        assert (
            {k: v for k, v in a.items() if k != "grad_norm"}
            == pytest.approx({k: v for k, v in b.items() if k != "grad_norm"}, abs=1e-5)
            if "loss" in a
            else a == b
        )


def swept(*words: Any) -> dict[str, Any]:
    done = run("sweep", *words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_each_run_is_what_it_is_alone(options, tmp_path, monkeypatch):
    made: list[int] = []
    stacked: list[int] = []
    together = Stack.gradients
    monkeypatch.setattr(Stack, "gradients", lambda self, *g: stacked.append(len(self.runs)) or together(self, *g))
    real = StoreSource._make
    monkeypatch.setattr(StoreSource, "_make", lambda self, *given: made.append(1) or real(self, *given))
    more = ["--tuner", "sherl,lst,probe", "--grid", "reduction=4", "--epochs", 4]
    table = swept(*options, *more, "--batch-size", 16, "--seeds", "3,1", "--out", tmp_path / "sweep")
    rows, shared = table["runs"], len(made)
    assert len(rows) == 6 and {row["order_seed"] for row in rows} == {3}
    assert len({row["run"] for row in rows}) == 6
    for row in rows[1::2]:  # those of seed 1, in the order that seed 3 draws; the objective of a T5's probe is another
        made.clear()
        alone = run(*shlex.split(row["command"])[1:], "--json")
        assert alone.exit_code == 0, alone.output
        # Each batch of each epoch and evaluation is made once, for however many runs; few more to count memory with.
        assert len(made) <= shared <= len(made) + 3
        result = json.loads(alone.stdout)
        assert result["run"] == f"{row['run']}-alone"
        assert_same_course(result["run"], row["run"])
        assert len([e for e in course(row["run"]) if "loss" in e]) == 24
        assert result["validation"] == row["validation"] and result["test"] == row["test"]
    assert max(stacked) == 2  # the two seeds of each tuner step as one
    assert course(rows[0]["run"]) != course(rows[1]["run"])  # the seeds draw other weights


def test_a_run_of_a_sweep_is_an_ordinary_run(bert, tmp_path):
    (row,) = swept(*bert, "--tuner", "lst", "--seeds", "2", "--out", tmp_path)["runs"]
    assert (row["order_seed"], row["seed"]) == (2, 2) and "--order-seed" not in row["command"]
    scored = json.loads(run("evaluate", row["run"], "--json").stdout)
    assert scored["accuracy"] == row["test"]["accuracy"]
    (tmp_path / "new.tsv").write_text("first\tsecond\na cat sleeps\tthe dog\n")
    told = json.loads(run("predict", row["run"], "--input", tmp_path / "new.tsv", "--json").stdout)
    assert told["rows"] == 1 and told["predictions"][0]["label"] in ("yes", "no")


class Killed(BaseException):
    pass


def test_a_killed_sweep_goes_on(bert, tmp_path, monkeypatch):
    words = [*bert, "--grid", "tuner=lst,probe", "--grid", "lr=1e-3,1e-2"]
    whole = swept(*words, "--out", tmp_path / "whole")
    assert len(whole["runs"]) == 4
    real, calls = Training.made, []

    def made(self, *given):
        calls.append(1)
        if len(calls) == 4 * 9 + 2:  # in the second epoch, between two runs
            raise Killed
        real(self, *given)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Training, "made", made)
        run("sweep", *words, "--out", tmp_path / "sweep")
    assert not list((tmp_path / "sweep").glob("*/metrics.json"))
    begun = len(calls)
    monkeypatch.setattr(Training, "made", lambda self, *given: calls.append(1) or real(self, *given))
    again = swept(*words, "--out", tmp_path / "sweep")
    steps = sum(row["steps"] for row in whole["runs"])
    assert len(calls) - begun == steps // 2  # the epoch that was checkpointed is not trained again
    for one, other in zip(whole["runs"], again["runs"], strict=True):
        assert_same_course(one["run"], other["run"])
        assert one["test"] == other["test"]
    calls.clear()
    more = swept(*words, "--seeds", "0,1", "--out", tmp_path / "sweep")
    assert len(calls) == steps and [r for r in more["runs"] if r["seed"] == 0] == again["runs"]


def test_a_run_that_diverges_leaves_the_others_alone(bert, tmp_path, monkeypatch):
    table = swept(*bert, "--tuner", "lst", "--grid", "lr=1e-3,1e30", "--clip", 0, "--out", tmp_path)
    good, bad = table["runs"]
    assert (good["status"], bad["status"]) == ("done", "diverged") and "try a smaller lr" in bad["why"]
    assert bad["dev"] is None and table["best"]["label"] == "lst lr=0.001"
    alone = run(*shlex.split(good["command"])[1:])
    assert alone.exit_code == 0
    assert_same_course(f"{good['run']}-alone", good["run"])
    monkeypatch.setattr(Training, "made", lambda self, *given: pytest.fail("nothing is left to train"))
    assert swept(*bert, "--tuner", "lst", "--grid", "lr=1e-3,1e30", "--clip", 0, "--out", tmp_path) == table


def test_baselines_stand_in_the_grid(bert, tmp_path):
    words = [*bert, "--tuner", "probe,norm-tuning", "--seeds", "0,1", "--max-steps", 3, "--out", tmp_path]
    table = swept(*words)
    assert [s["label"] for s in table["settings"]] == ["probe", "norm-tuning"]
    assert all(row["status"] == "done" and row["score"] is not None for row in table["runs"])
    assert len({metrics(row)["layout"]["xxh3"] for row in table["runs"]}) == 1
    assert swept(*words) == table
    (apart,) = table["differences"]
    assert apart["score"]["seeds"] == 2 and apart["score"]["error"] is not None
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["name"] for r in rows] == [r["name"] for r in table["runs"]]
    assert [float(r["test_accuracy"]) for r in rows] == [r["test"]["accuracy"] for r in table["runs"]]


def metrics(row: dict[str, Any]) -> dict[str, Any]:
    return json.loads((Path(row["run"]) / "metrics.json").read_text())


def test_another_run_in_the_folder_is_not_replaced(bert, tmp_path):
    swept(*bert, "--tuner", "probe", "--out", tmp_path)
    refused = run("sweep", *bert, "--tuner", "probe", "--pooling", "first", "--out", tmp_path)
    assert refused.exit_code != 0 and "other options" in refused.stderr and "--out" in refused.stderr


def test_a_baseline_of_other_rows_is_not_taken_for_this_one(checkpoints, tmp_path):
    task, labels = tmp_path / "rows.csv", ["a", "b"]
    words = ["--model", checkpoints["bert"], "--task", task, "--store", tmp_path / "store"]
    sweep = [*words, "--tuner", "norm-tuning", "--max-steps", 1, "--out", tmp_path / "sweep"]
    for _ in range(2):
        task.write_text("text,label\n" + "".join(f"the cat {i},{labels[i % 2]}\n" for i in range(20)))
        assert run("extract", *words, "--for", "probe").exit_code == 0
        found = run("sweep", *sweep)
        labels.reverse()
    assert found.exit_code != 0 and "other options or other rows" in found.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tuner", "lts"], "did you mean"),
        (["--tuner", "lorra"], "did you mean lora"),
        (["--grid", "lr=1e-3"], "--tuner"),
        (["--tuner", "lst", "--grid", "lr"], "OPTION=VALUE"),
        (["--tuner", "lst", "--grid", "reductoin=4"], "did you mean reduction"),
        (["--tuner", "probe", "--grid", "reduction=4,8"], "would do nothing"),
        (["--tuner", "lst", "--grid", "seed=1,2"], "--seeds"),
        (["--tuner", "lst", "--grid", "store=a,b"], "does not vary store"),
        (
            ["--tuner", "lst", "--grid", "target_step=0.1,0.2"],
            "does not vary target-step; all runs of a sweep have one:",
        ),
        (["--tuner", "lst", "--grid", "target-step=0.1,0.2"], "give --target-step"),
        (["--tuner", "lst", "--grid", "grid=0.1,0.2"], "give --target-step"),
        (["--tuner", "lst", "--grid", "grid=0.1", "--grid", "target_step=0.2"], "target-step is given twice"),
        (["--tuner", "lst", "--grid", "for=lst,probe"], "does not vary for; give --tuner"),
        (["--tuner", "lst", "--grid", "lr=fast"], "lr"),
        (["--tuner", "lst", "--grid", "metric=mcc,f1"], "does not vary metric"),
        (["--tuner", "lst", "--task", "rte,cola"], "sweep takes one task a run"),
        (["--tuner", "lst", "--model", "a=x,b=y"], "sweep takes one backbone a run"),
        (["--tuner", "lst", "--grid", "reduction=7"], "lst-reduction7-s0: reduction"),
        (["--tuner", "lst", "--seeds", "1,x"], "--seeds"),
    ],
)
def test_wrong_sweeps_are_refused_in_one_line(bert, tmp_path, words, said):
    done = run("sweep", *bert, *words, "--out", tmp_path / "sweep")
    assert done.exit_code != 0 and said in done.stderr and not (tmp_path / "sweep").exists()
    assert "Traceback" not in done.output


def test_a_sweep_file_lists_variants_and_a_grid(tmp_path):
    file = tmp_path / "ablation.yaml"
    file.write_text(
        "seeds: [0, 1]\nepochs: 3\ntuner: sherl\ngrid: {lr: [1e-3, 3e-3]}\n"
        "runs:\n- {name: max pool, blend: max}\n- {blend: average}\n- {tuner: lora}\n"
    )
    sweep, common = read_sweep(file)
    assert common == {"epochs": 3} and sweep.methods() == ["lora", "sherl"] and sweep.seeds == [0, 1]
    made = trials(sweep, Recipe(task="x", model="m", epochs=3))
    assert len(made) == 12 == len({t.name for t in made})
    assert made[0].label == "max pool lr=0.001" and made[4].label == "sherl blend=average lr=0.001"
    assert made[0].recipe.tuner_options["blend"] == "max" and made[8].baseline == "lora"
    assert {t.recipe.lr for t in made} == {1e-3, 3e-3} and {t.recipe.ordering for t in made} == {0}


def test_points_that_come_to_the_same_run_once_and_names_never_collide():
    both = trials(Sweep(parse_grid(["reduction=4,8", "layers=0+2,1"]), tuners=["lst", "probe"]), Recipe(task="x"))
    assert len(both) == 4 + 2 and both[0].recipe.tuner_options["layers"] == (0, 2)
    odd = Sweep({"insert": ["single:1", "single 1"]}, tuners=["sherl"])
    assert len({t.name for t in trials(odd, Recipe(task="x"))}) == 2
    long = trials(Sweep(parse_grid(["layers=" + ",".join("+".join(map(str, range(n))) for n in (40, 41))]),
                        tuners=["lst"]), Recipe(task="x"))  # fmt: skip
    assert len({t.name for t in long}) == 2 and all(len(t.name) <= 80 for t in long)


def test_differences_are_paired_by_seed():
    def rows(label: str, scores: list[float], figure: str = "average") -> list[dict[str, Any]]:
        known = {
            "status": "done",
            "figure": figure,
            "setting": {},
            "trainable_parameters": 1,
            "seconds_per_epoch": 1.0,
            "run": label,
        }
        return [{"label": label, "seed": i, "dev": x, "score": x, **known} for i, x in enumerate(scores)]

    a, b = rows("a", [0.9, 0.8, 0.7]), rows("b", [0.8, 0.8, 0.4])
    found = difference(a, b)["score"]
    assert found["mean"] == pytest.approx(-0.4 / 3) and found["seeds"] == 3
    spread = math.sqrt(sum((x + 0.4 / 3) ** 2 for x in (-0.1, 0.0, -0.3)) / 2)
    assert found["error"] == pytest.approx(spread / math.sqrt(3))
    table = summary([*a, *b, *rows("c", [0.99])])
    assert table["best"]["label"] == "c" and [d["label"] for d in table["differences"]] == ["a", "b"]
    assert table["differences"][0]["score"] == {"mean": pytest.approx(-0.09), "error": None, "seeds": 1}
    table = summary([*rows("a", [0.5, 0.9], "mse"), *rows("b", [0.6, 0.7], "mse")])  # of an error the smallest is best
    assert table["best"]["label"] == "b" and table["differences"][0]["score"]["mean"] == pytest.approx(0.05)


def test_the_order_has_a_seed_of_its_own(bert, tmp_path):
    def first(*words: Any) -> list[Any]:
        assert run("train", *bert, "--tuner", "probe", *words).exit_code == 0
        return course(words[-1])

    words = ["--seed", 5, "--order-seed", 5, "--out", tmp_path / "same"]
    assert first("--seed", 5, "--out", tmp_path / "plain") == first(*words)
    assert first("--seed", 5, "--order-seed", 6, "--out", tmp_path / "other") != course(tmp_path / "plain")
    with pytest.raises(UserError, match="--order-seed"):
        Recipe(order_seed=-1)


def test_baselines_are_named_as_they_are_defined():
    assert {name: c.description for name, c in BASELINES.items()} == catalog.BASELINES


def test_a_sweep_without_a_store_says_so_in_one_line(checkpoints, table, tmp_path):
    words = ["--model", checkpoints["bert"], "--task", table, *WORDS, "--store", tmp_path / "none"]
    said = refused(run("sweep", *words, "--tuner", "lst,probe", "--grid", "lr=1e-3,1e-2", "--out", tmp_path / "out"))
    assert "lst-lr0.001-s0: there is no store" in said and "run: pipeline extract" in said


def test_too_many_frozen_blocks_are_told_by_the_name_that_was_given(bert, tmp_path):
    said = refused(run("sweep", *bert, "--tuner", "lora:2@4", "--out", tmp_path / "out"))
    assert "lora:2@4: of the 4 blocks" in said
