"""Seeds of a flagship tuner step as one in a sweep, and what steps in turn says why."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.train.fit.stack import told
from tests.pipeline.test_errors import run

TEXT = ("--text", "first", "--text-pair", "second", "--label", "label")
AS_ONE = {
    "bert": "sherl,unipt,lst,probe,side-tuning", "t5": "unipt,lst,side-tuning,probe", "decoder": "sherl,lst,qst,unipt",
    "vit": "sherl,unipt,lst,fixed", "swin": "e3va,fixed,probe",
}  # fmt: skip
QUICK = ("bert", "swin")


@pytest.fixture
def swept(checkpoints, table, pictures, tmp_path):
    def sweep(family: str, tuners: str, *more: Any) -> tuple[Any, str]:
        task = ["--task", table, *TEXT] if family in ("bert", "t5", "decoder") else ["--task", pictures]
        options = ["--model", checkpoints[family], *task, "--store", tmp_path / "store"]
        done = run("extract", *options, "--for", tuners)
        assert done.exit_code == 0, done.output
        how = ["--seeds", "0,1", "--max-steps", 2, "--batch-size", 8, "--out", tmp_path / "sweep"]
        done = run("sweep", *options, "--tuner", tuners, *how, *more)
        assert done.exit_code == 0, done.output
        return json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"], done.output

    return sweep


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.matrix) for f in AS_ONE])
def test_flagship_tuners_step_as_one(swept, family):
    rows, said = swept(family, AS_ONE[family])
    assert {row["name"]: (row["stacked"], row["in_turn"]) for row in rows} == {row["name"]: (2, None) for row in rows}
    assert len(rows) == 2 * len(AS_ONE[family].split(",")) and "stepped in turn" not in said


def test_what_steps_in_turn_says_why(swept, caplog):
    with caplog.at_level("INFO"):
        rows, said = swept("bert", "head2toe,probe")
    why = "the model keeps more than its parameters, such as tuner."
    apart = [row for row in rows if row["name"].startswith("head2toe")]
    assert len(apart) == 2 and all(row["stacked"] == 1 and row["in_turn"].startswith(why) for row in apart)
    assert f"stepped in turn, not as one: head2toe-s0, head2toe-s1 ({why}" in said
    assert any(f"head2toe-s0 and 1 more step in turn: {why}" in line for line in caplog.messages)  # with --verbose
    assert all(row["stacked"] == 2 and row["in_turn"] is None for row in rows if row not in apart)


def test_why_is_the_first_sentence():
    assert told(RuntimeError("vmap: no nonzero. Please file\nan issue")) == "RuntimeError: vmap: no nonzero"
