"""What a fold must keep on one side: the windows of a text, and rows of several slots that share an input."""

from __future__ import annotations

from pathlib import Path

from pipeline.jobs.job import load_job
from pipeline.jobs.joint import load_joint
from pipeline.recipe import Recipe
from tests import decoders, tiny
from tests.pipeline.test_errors import refused
from tests.pipeline.test_errors import run as invoke
from tests.pipeline.test_language import run, write


def test_windows_of_a_text_stand_on_one_side(tmp_path: Path) -> None:
    words = tiny.sentences(60)
    texts = [" ".join(words[i : i + 5]) for i in range(0, 60, 5)]
    rows = write(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    folder = decoders.checkpoint(tmp_path / "model")
    common = ("--model", folder, "--task", rows, "--store", tmp_path / "store")
    run("extract", *common, "--for", "probe", "--max-length", 20, "--stride", 7)
    recipe = Recipe(model=str(folder), task=str(rows), store=str(tmp_path / "store"), tuner="probe")
    plain, held = load_job(recipe).tables, list[str]()
    for number in (1, 2, 3, 4):
        own = load_job(Recipe(**{**vars(recipe), "fold": f"{number}/4"})).tables
        for table in (own["train"], own["validation"]):
            whole = [i for i, meta in enumerate(table.metas) if meta.get("window", [1])[0] == 1]
            assert [i for i, fields in enumerate(table.texts) if fields] == whole  # no window without its text's first
            for i, after in zip(whole, [*whole[1:], len(table)], strict=True):
                assert [m["window"] for m in table.metas[i:after]] == [[k + 1, after - i] for k in range(after - i)]
        held += [fields[0] for fields in own["validation"].texts if fields]
    assert sorted(held) == sorted(f[0] for s in ("train", "validation") for f in plain[s].texts if f)
    both = load_job(Recipe(**{**vars(recipe), "fold": "all"})).tables["train"]
    assert len(both) == len(plain["train"]) + len(plain["validation"])  # which have no labels, and lack none
    run("train", *common, "--tuner", "probe", "--epochs", 1, "--fold", "1/4", "--out", tmp_path / "run")


def test_rows_that_share_an_input_of_a_slot_stand_on_one_side(tmp_path: Path) -> None:
    models = f"a={tiny.bert(tmp_path / 'one')},b={tiny.bert(tmp_path / 'other', seed=1)}"
    few, many = tiny.sentences(10, 1), tiny.sentences(50, 2)
    lines = [f"{few[i // 5]}\t{s}\t{'yes' if 'cat' in s else 'no'}" for i, s in enumerate(many)]
    file = tmp_path / "rows.tsv"
    file.write_text("\n".join(["first\tsecond\tlabel", *lines]) + "\n")
    common = ["--model", models, "--task", file, "--text", "a=first,b=second", "--label", "label"]
    common += ["--store", tmp_path / "store"]
    run("extract", *common, "--for", "probe")
    run("train", *common, "--tuner", "probe", "--epochs", 1, "--fold", "1/2", "--out", tmp_path / "run")
    recipe = Recipe(
        model=models, task=str(file), text="a=first,b=second", label="label", store=str(tmp_path / "store"),
        tuner="probe", fold="1/2",
    )  # fmt: skip
    tables = {slot: job.tables for slot, job in load_joint(recipe).jobs.items()}
    for split in ("train", "validation"):
        assert list(tables["a"][split].joined["b"]) == list(tables["b"][split].keys)
    assert tables["a"]["validation"].keys and not {*tables["a"]["train"].keys} & {*tables["a"]["validation"].keys}
    said = refused(invoke("train", *common, "--tuner", "probe", "--fold", "1/11", "--out", tmp_path / "no"))
    assert "share no input" in said
