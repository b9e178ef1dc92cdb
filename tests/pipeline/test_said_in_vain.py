"""What is said beside a task's name is held to, or refused: files, steps of a grid, a run's own options, seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pipeline
from pipeline import api
from pipeline.commands.compare import run_compare
from pipeline.extract.tasks import TaskError, load_task
from pipeline.jobs.job import load_job
from pipeline.recipe import Recipe
from pipeline.runs import read_inputs
from pipeline.store.errors import UserError
from tests import tiny


@pytest.fixture(scope="module")
def stored(checkpoints, tmp_path_factory) -> tuple[Path, dict[str, Any], str]:
    """A folder with rows.tsv, more.tsv and a store in which rows.tsv was extracted without another file; its id."""
    folder = tmp_path_factory.mktemp("vain")
    table = tiny.write_table(folder / "rows.tsv", 40)
    tiny.write_table(folder / "more.tsv", 12, seed=5)
    options = {"model": str(checkpoints["bert"]), "store": str(folder / "store")}
    columns = {"text": "first", "text_pair": "second", "label": "label"}
    done = api.extract(str(table), tuners=("probe",), **columns, **options)
    return folder, {**options, "tuner": "probe"}, done["task id"]


@pytest.mark.parametrize("option", ["validation", "test"])
@pytest.mark.parametrize("file", ["more.tsv", "not-there.tsv"])
@pytest.mark.parametrize("task", ["rows.tsv", "rows", "id"])
def test_a_file_beside_the_rows_is_not_passed_over(stored, option, file, task):
    folder, options, named = stored
    asked = {"rows.tsv": str(folder / "rows.tsv"), "rows": "rows", "id": named}[task]
    with pytest.raises(UserError, match=f"without --{option}"):
        load_job(Recipe(task=asked, **options, **{option: str(folder / file)}))
    assert load_job(Recipe(task=asked, **options)).tables.keys() == {"train", "validation", "test"}


def test_an_edited_file_beside_a_task_by_name_or_id(checkpoints, tmp_path):
    table, held = tiny.write_table(tmp_path / "rows.tsv", 40), tiny.write_table(tmp_path / "held.tsv", 12, seed=5)
    options = {"model": str(checkpoints["bert"]), "store": str(tmp_path / "store"), "validation": str(held)}
    columns = {"text": "first", "text_pair": "second", "label": "label"}
    named = api.extract(str(table), tuners=("probe",), **columns, **options)["task id"]
    for task in ("rows", named):
        assert len(load_job(Recipe(task=task, tuner="probe", **options)).tables["validation"]) == 12
    held.write_text(held.read_text().replace("\tyes", "\tno", 1))
    for task in ("rows", named):
        with pytest.raises(UserError, match=r"held\.tsv is not the file"):
            load_job(Recipe(task=task, tuner="probe", **options))


def test_a_grid_where_there_is_none(stored, tmp_path):
    folder, options, named = stored
    numbers = tmp_path / "numbers.tsv"
    numbers.write_text("text\tscore\n" + "".join(f"{t}\t{i / 10}\n" for i, t in enumerate(tiny.sentences(20))))
    for task in (str(folder / "rows.tsv"), str(numbers)):
        with pytest.raises(TaskError, match="no such step, as STS-B has"):
            load_task(task, grid=0.2)
    for task in (str(folder / "rows.tsv"), named):
        with pytest.raises(UserError, match=r"--target-step 0\.2: task .* leave it out"):
            load_job(Recipe(task=task, grid=0.2, **options))


def test_columns_of_what_is_no_table(pictures):
    with pytest.raises(TaskError, match="--label is for a table"):
        load_task(str(pictures), label="class")


def test_a_run_is_read_as_it_was_trained(stored, tmp_path):
    _, options, named = stored
    api.train(task=named, epochs=1, out=str(tmp_path / "run"), **options)
    for other in ({"pooling": "first"}, {"train_precision": "bfloat16"}, {"nonsense": 1}):
        with pytest.raises(UserError, match=f"^{next(iter(other))}: a run is read as it was trained"):
            pipeline.load_run(tmp_path / "run", **other)
    assert pipeline.load_run(tmp_path / "run", device="cpu").evaluate("test")


@pytest.mark.parametrize("second", ["", ', "second": null', ', "second": {"b": 1}'])
def test_a_text_that_is_missing_is_not_predicted_on(stored, tmp_path, second):
    _, options, named = stored
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"first": "a", "second": "b"}\n{"first": "a"' + second + "}\n")
    with pytest.raises(TaskError, match=r"line 2.*'second' is"):
        read_inputs(rows, load_job(Recipe(task=named, **options)).spec)


def test_a_preset_of_methods_that_are_not_compared(stored, tmp_path):
    folder, options, _ = stored
    recipe = Recipe(task=str(folder / "rows.tsv"), **options)
    with pytest.raises(UserError, match="--preset paper: it is for full, lora"):
        run_compare(recipe, ["probe"], [0], tmp_path / "runs", None, lambda text: None, preset="paper")


def test_a_seed_that_no_generator_takes():
    with pytest.raises(UserError, match="--seed: below"):
        Recipe(seed=1 << 70)
