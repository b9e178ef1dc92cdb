"""The ablations in configs/ablations: each file parses, plans and trains on a small backbone of 12 layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertConfig, BertModel

from pipeline.command_lines import command_line
from pipeline.commands.grid import Trial, read_sweep, trials
from pipeline.recipe import Recipe
from pipeline.store.errors import UserError
from pipeline.train.baselines.methods import baseline
from tests import tiny
from tests.pipeline.test_errors import run
from tests.pipeline.test_plan import no_measuring  # noqa: F401

FILES = sorted((Path(__file__).resolve().parents[2] / "configs" / "ablations").glob("*.yaml"))
POINTS = {
    "baseline-frozen": 10, "baseline-sizes": 8, "lst-ladders": 5, "lst-layers": 4, "lst-start": 4, "reduction": 8,
    "sherl-blend": 6, "sherl-insert": 7, "sherl-late-layer": 6, "sherl-layers": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A BERT of 12 layers and width 64, and a store with what all presets read."""
    home = tmp_path_factory.mktemp("twelve")
    tokenizer = tiny._tokenizer("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=12, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    given = {
        "model": str(home / "model"),
        "task": str(tiny.write_table(home / "rows.tsv", 40)),
        "store": str(home / "s"),
    }
    options = [f"--{name}={value}" for name, value in given.items()]
    words = ["--text", "first", "--label", "label", "--init", "magnitude", "--insert", "multi:8", "--network", "blocks"]
    done = run("extract", *options, *words, "--for", "sherl,lst,side-tuning,probe")
    assert done.exit_code == 0, done.output
    return {"options": options, "recipe": Recipe(**given, text="first", label="label")}


def points(file: Path, recipe: Recipe) -> list[Trial]:
    sweep, common = read_sweep(file)
    assert list(sweep.seeds) == [0, 1, 2] and not common
    return [trial for trial in trials(sweep, recipe) if trial.recipe.seed == 0]


def test_every_file_is_known(twelve):
    assert {file.stem: len(points(file, twelve["recipe"])) for file in FILES} == POINTS


def trained(file: Path, options: list[str], out: Path) -> dict[str, Any]:
    words = ["--seeds", 0, "--max-steps", 1, "--limit", 16, "--batch-size", 8, "--out", out, "--json"]
    done = run("sweep", *options, "--sweep", file, *words)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_point_of_each_trains_and_plans(twelve, tmp_path, file, no_measuring):  # noqa: F811
    """The last one; with `-m matrix` all."""
    wanted = points(file, twelve["recipe"])[-1]
    kept = yaml.safe_load(file.read_text())
    if "runs" in kept:
        kept["runs"] = kept["runs"][-1:]
    else:
        kept["grid"] = {name: values[-1:] for name, values in kept["grid"].items()}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(kept))
    (row,) = trained(tmp_path / "one.yaml", twelve["options"], tmp_path / "sweep")["runs"]
    assert (
        row["status"] == "done"
        and row["label"] == wanted.label
        and json.dumps(row["setting"], sort_keys=True) == json.dumps(wanted.setting, sort_keys=True)
    )
    if not wanted.baseline:
        planned = run(*command_line("plan", wanted.recipe).split()[1:], "--json")
        assert planned.exit_code == 0, planned.output
        assert json.loads(planned.stdout)


@pytest.mark.matrix
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_all_points_of_each_train(twelve, tmp_path, file):
    table = trained(file, twelve["options"], tmp_path / "sweep")
    assert len(table["runs"]) == POINTS[file.stem] and all(row["status"] == "done" for row in table["runs"])
    counts = [row["trainable_parameters"] for row in table["runs"]]
    if file.stem == "reduction":
        assert counts[:4] == sorted(set(counts[:4])) and counts[4:] == sorted(set(counts[4:]))


def test_baselines_have_a_size_and_frozen_blocks(twelve):
    from pipeline.extract.pretrained import Checkpoint

    def count(name: str) -> int:
        checkpoint = Checkpoint(Path(twelve["recipe"].model), "x")
        model = BertModel.from_pretrained(twelve["recipe"].model)
        model.requires_grad_(False)
        baseline(name).prepare(checkpoint.backbone, model)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    lora = 12 * 2 * 2 * 64  # layers, queries and values, two factors of a rank
    assert [count(f"lora:{r}") for r in (4, 8)] == [4 * lora, 8 * lora] and count("lora") == 8 * lora
    assert count("lora:4@3") == 4 * lora * 9 // 12
    width = 12 * (2 * 64 + 1)
    assert count("adapter:6") == 6 * width + 12 * 64 and count("adapter:6@6") == count("adapter:6") // 2
    block = sum(p.numel() for p in BertModel.from_pretrained(twelve["recipe"].model).encoder.layer[0].parameters())
    assert count("full@9") == 3 * block
    for name, said in (
        ("lora:x", "NAME:SIZE"),
        ("full:3", "no size"),
        ("prompt@3", "nothing of it"),
        ("lora@12", "1 to 11"),
    ):
        with pytest.raises(UserError, match=said):
            count(name)
    with pytest.raises(UserError, match="papers' sizes"):
        baseline("lora:4", "paper")
