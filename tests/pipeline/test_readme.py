"""The README's Python examples run as written, on a store made the way the README says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.commands.demo_data import demo_task
from pipeline.commands.extract import run_extract
from pipeline.extract.pretrained import local
from pipeline.recipe import Recipe

README = Path(__file__).resolve().parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_python_examples_run(tmp_path, monkeypatch, capsys):
    if local("minilm") is None:
        pytest.skip("the extra `demo` is not installed: the README's example needs its encoder")
    monkeypatch.chdir(tmp_path)
    task = demo_task(train=128, validation=16, test=16)
    run_extract(Recipe(model="minilm", task="demo", store="demo/store", tuners=("probe", "sherl")), print, True, task)
    names: dict[str, object] = {}
    for example in blocks("python"):
        exec(compile(example, str(README), "exec"), names)
    said = capsys.readouterr().out
    assert re.search(r"last loss \d+\.\d+", said)
    assert re.search(r"[\d,]+ rows, the first of 384 directions holds [1-9]\d*%", said) and names["longest"] > 4


def test_every_command_of_the_readme_exists():
    from pipeline.cli.main import main

    for line in "\n".join(blocks("bash")).splitlines():
        for words in re.findall(r"pipeline ((?:store )?[a-z]+)", line.split("#")[0]):
            command = main
            for word in words.split():
                command = command.commands[word]
            options = {o for p in command.params for o in p.opts}
            for option in re.findall(r"(--[a-z-]+)", line.split("#")[0].split("pipeline", 1)[1]):
                assert option in options, (line, option)
