"""README and the page of Python examples run as written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.commands.demo_data import demo_task
from pipeline.commands.extract import run_extract
from pipeline.extract.pretrained import local
from pipeline.recipe import Recipe
from tests import tiny
from tests.pipeline.pages import DOCS, README, blocks, follow
from tests.pipeline.test_retrieval import captioned, write


def own_table(folder: Path, count: int = 36) -> None:
    """my.csv, and new.csv with rows to predict."""
    texts = tiny.sentences(count)
    rows = [f"{text},{'yes' if 'cat' in text else 'no'}" for text in texts]
    (folder / "my.csv").write_text("\n".join(["sentence,label", *rows]) + "\n", encoding="utf-8")
    (folder / "new.csv").write_text("\n".join(["sentence", *tiny.sentences(4, seed=9)]) + "\n", encoding="utf-8")


def own_photos(folder: Path) -> None:
    """captions.csv, and the images that it names in photos/, beach.jpg among them."""
    rows = captioned(folder / "photos", suffix=".jpg")
    (folder / "photos" / rows[0][0]).rename(folder / "photos" / "beach.jpg")
    write(folder / "captions.csv", [(name.replace(rows[0][0], "beach.jpg"), text) for name, text in rows])


def test_the_python_examples_run(tmp_path, monkeypatch, capsys):
    if local("minilm") is None:
        pytest.skip("the extra `demo` is not installed: the example needs its encoder")
    monkeypatch.chdir(tmp_path)
    task = demo_task(train=128, validation=16, test=16)
    run_extract(Recipe(model="minilm", task="demo", store="demo/store", tuners=("probe", "sherl")), print, True, task)
    names: dict[str, object] = {}
    for _, example in blocks(DOCS / "howto" / "python.md", "python"):
        exec(compile(example, "docs/howto/python.md", "exec"), names)
    said = capsys.readouterr().out
    assert re.search(r"last loss \d+\.\d+", said)
    assert re.search(r"[\d,]+ rows, the first of 384 directions holds [1-9]\d*%", said) and names["longest"] > 4


@pytest.mark.matrix  # the tutorial of the same name, which runs always, has the same commands
def test_the_commands_of_the_readme_run(checkpoints, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed: README's commands not tested")
    monkeypatch.chdir(tmp_path)
    own_table(tmp_path)
    own_photos(tmp_path)
    rows = [{"prompt": text[:-5], "completion": text[-5:]} for text in tiny.sentences(12)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    models = {"minilm": "bert", "resnet50": "resnet", "FOLDER": "decoder"}
    said = follow(README, {name: str(checkpoints[kind]) for name, kind in models.items()}, without=("pip install",))
    assert len(said) == 11 and (tmp_path / "report.html").is_file()
    predicted = next(text for line, text in said.items() if line.startswith("pipeline predict"))
    assert predicted.count("yes") + predicted.count("no ") >= 4
    found = next(text for line, text in said.items() if line.startswith("pipeline search"))
    assert found.count(".jpg") == 10


def test_the_readme_has_its_two_commands():
    """Other programs look for them."""
    section = README.read_text(encoding="utf-8").split("## Two commands", 1)[1].split("\n## ", 1)[0]
    assert "pip install -e '.[demo]' && pipeline demo" in section
    assert "pytest -n auto --dist loadfile" in section


@pytest.mark.matrix
def test_the_demo_of_the_readme_runs(tmp_path, monkeypatch):
    from tests.pipeline.pages import execute

    monkeypatch.chdir(tmp_path)
    assert "next:" in execute("pipeline demo")
