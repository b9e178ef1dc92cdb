"""Live baselines, and the table that sets them beside tuners."""

from __future__ import annotations

import csv
import json
import sys

import pytest
import torch
from click.testing import CliRunner

from pipeline.cli.main import main
from pipeline.commands.compare import backbone_parameters
from pipeline.extract.backbones.bert import Bert
from pipeline.extract.pretrained import Checkpoint
from pipeline.lookup.objective import class_objective
from pipeline.store import UserError
from pipeline.train.baselines.methods import BASELINES, BaselineModel, baseline
from pipeline.train.tuners import tuner_class
from tests.train.conformance import Case

THREE = class_objective(Bert, tuner_class("probe"), [()] * 3)


def made(checkpoints, pictures, backbone: str, name: str):
    case = Case(Checkpoint(checkpoints[backbone], backbone), "probe", pictures)
    module = case.backbone.load(case.checkpoint.folder, torch.float32, "sdpa", "cpu")
    return case, BaselineModel(baseline(name), case.backbone, module, THREE, 0)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("backbone", ["bert", "vit", "clip", "cifar", "swin"])
def test_a_baseline_trains_what_it_says_and_starts_at_the_backbone(checkpoints, pictures, backbone, name):
    refused = {"cifar": ("lora", "adapter", "adaptformer"), "bert": ("adaptformer",)}.get(backbone, ())
    if name in refused or (name == "prompt" and backbone != "bert"):
        with pytest.raises(UserError, match=name):
            made(checkpoints, pictures, backbone, name)
        return
    case, model = made(checkpoints, pictures, backbone, name)
    inputs = case.inputs
    batch = inputs.batch()
    batch.targets = {"label": torch.arange(len(batch)) % 3}
    probe = case.model().eval()
    if name != "prompt":
        torch.testing.assert_close(model.eval()(batch), probe(case.batch()), rtol=1e-4, atol=1e-5)
    trains_only_its_own(model, batch)
    if name != "full":
        assert model.trainable_parameters() < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("backbone", ["bert", "roberta", "clip_text", "vit", "clip", "cifar", "swin", "t5"])
def test_full_fine_tuning_trains_what_the_backbone_has(checkpoints, pictures, backbone):
    """Numerator and denominator of a share are of the same things."""
    if backbone == "t5":
        case = Case(Checkpoint(checkpoints["t5"], "t5"), "sherl", pictures)
        module = case.backbone.load(case.checkpoint.folder, torch.float32, "sdpa", "cpu")
        model = BaselineModel(baseline("full"), case.backbone, module, case.objective)
    else:
        case, model = made(checkpoints, pictures, backbone, "full")
    trained = sum(p.numel() for p in model.tuner.parameters() if p.requires_grad)
    assert trained == backbone_parameters(case.backbone)


def trains_only_its_own(model: BaselineModel, batch) -> None:
    frozen = {k: p.detach().clone() for k, p in model.tuner.model.named_parameters() if not p.requires_grad}
    before = {k: v.clone() for k, v in model.trainable_state().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # a factor that starts at zero hides its partner's gradient in the first step
        optimizer.zero_grad()
        model.train().loss(batch).backward()
        optimizer.step()
    after = model.trainable_state()
    assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith("tuner.model."))
    now = dict(model.tuner.model.named_parameters())
    assert all(torch.equal(now[k], v) for k, v in frozen.items())
    model.load_trainable(before)
    assert all(torch.equal(v, model.trainable_state()[k]) for k, v in before.items())


def test_the_statistics_of_a_head_are_kept(checkpoints, pictures):
    _, model = made(checkpoints, pictures, "vit", "partial-1")
    model.head.norm = torch.nn.BatchNorm1d(3)
    model.head.norm.running_mean.fill_(1)
    kept = {name: value.clone() for name, value in model.trainable_state().items()}
    model.head.norm.running_mean.zero_()
    model.load_trainable(kept)
    assert (model.head.norm.running_mean == 1).all()


@pytest.mark.parametrize("name", BASELINES)
def test_on_a_t5_they_start_at_its_own_loss(checkpoints, pictures, name):
    case = Case(Checkpoint(checkpoints["t5"], "t5"), "sherl", pictures)
    backbone = case.backbone
    module = backbone.load(case.checkpoint.folder, torch.float32, "sdpa", "cpu")
    if name in ("bitfit", "adaptformer"):
        with pytest.raises(UserError, match="no biases" if name == "bitfit" else "no MLP of a vision transformer"):
            BaselineModel(baseline(name), backbone, module, case.objective)
        return
    model = BaselineModel(baseline(name), backbone, module, case.objective, 0)
    batch = case.inputs.batch()
    batch.targets = {"label": torch.arange(len(batch)) % 3}
    chosen = model.eval().predict(batch)["label"]
    assert chosen.shape == (len(batch),) and int(chosen.max()) < 3
    # Teacher forcing on "2 3", by the model's own forward pass.
    chains = [list(c) for c in case.chains]
    gold = backbone.with_decoder(case.inputs, [[backbone.start_id, *chains[2][:-1]]] * len(batch)).batch()
    gold.targets = {"label": torch.full((len(batch),), 2)}
    if name != "prompt":
        layout = gold.layout("encoder")
        own = case.loaded(
            input_ids=layout.pad(gold.columns["encoder.ids"]),
            attention_mask=layout.mask.long(),
            labels=torch.tensor([chains[2]] * len(batch)),
        )
        torch.testing.assert_close(model.loss(gold), own.loss, rtol=1e-5, atol=1e-6)
    trains_only_its_own(model, gold)


def test_prompt_tuning_is_tokens_before_the_text(checkpoints, pictures):
    case, model = made(checkpoints, pictures, "bert", "prompt")
    batch, virtual = case.inputs.batch(), model.tuner.virtual
    table = model.tuner.model.get_input_embeddings()
    assert table.prompt.shape == (virtual, 32)
    # With the prompt's vectors those of real tokens, the same as a text that begins with these tokens.
    picks = torch.arange(5, 5 + virtual)
    table.prompt.data = table.table.weight[picks].clone()
    (found,), at = model.eval()(batch).values(), 0
    for i, n in enumerate(batch.lengths["encoder"].tolist()):
        start = int(batch.layout("encoder").first[i])
        ids = torch.cat([picks, batch.columns["encoder.ids"][start : start + n]])[None]
        types = torch.cat([torch.zeros(virtual).long(), batch.columns["encoder.types"][start : start + n]])[None]
        own = case.loaded(input_ids=ids, token_type_ids=types).last_hidden_state[0, virtual:]
        torch.testing.assert_close(found[at : at + n], own, rtol=1e-4, atol=1e-5)
        at += n


def test_an_unknown_baseline_offers_the_nearest():
    with pytest.raises(UserError, match="did you mean lora"):
        baseline("lorra")


def test_compare_prints_one_table(checkpoints, table, tmp_path):
    common = ["--model", str(checkpoints["bert"]), "--task", str(table), "--text", "first", "--text-pair", "second",
              "--label", "label", "--store", str(tmp_path / "store")]  # fmt: skip
    invoke = CliRunner().invoke
    assert invoke(main, ["extract", *common, "--for", "sherl,unipt,probe"]).exit_code == 0
    options = ["--tuners", "probe,sherl,unipt,lora,full", "--seeds", "0,1", "--epochs", "1", "--reduction", "4"]
    where = ["--out", str(tmp_path / "runs"), "--csv", str(tmp_path / "table.csv")]
    result = invoke(main, ["compare", *common, *options, *where, "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [r["method"] for r in rows] == ["probe", "sherl", "unipt", "lora", "full"]
    by = {r["method"]: r for r in rows}
    total = json.loads(result.stdout)["backbone_parameters"]
    for row in rows:  # every head of classes is this linear map, which is no part of a backbone
        assert row["head"] == 32 * 2 + 2 and row["share"] == (row["trainable"] - row["head"]) / total
    assert by["full"]["share"] == 1 and by["probe"]["share"] == 0 < by["sherl"]["share"]
    assert by["full"]["live"] and not by["sherl"]["live"]
    assert all(r["memory_bytes"] > 0 and r["seconds_per_epoch"] > 0 and r["seeds"] == 2 for r in rows)
    assert by["probe"]["memory_bytes"] < by["full"]["memory_bytes"]
    with (tmp_path / "table.csv").open() as file:
        assert [r["method"] for r in csv.DictReader(file)] == list(by)
    shown = invoke(main, ["compare", *common, "--tuners", "probe", "--epochs", "1", "--out", str(tmp_path / "more")])
    assert "method" in shown.stdout and "probe" in shown.stdout and shown.exit_code == 0
    assert f"but those of the task's head, of the {total:,} of the backbone" in shown.stdout
    refused = invoke(main, ["compare", *common, "--tuners", "probe,sherrl"])
    assert refused.exit_code != 0 and "unknown 'sherrl'" in refused.stderr


@pytest.fixture
def probed(checkpoints, table, tmp_path) -> list[str]:
    common = ["--model", str(checkpoints["bert"]), "--task", str(table), "--text", "first", "--text-pair", "second",
              "--label", "label", "--store", str(tmp_path / "store")]  # fmt: skip
    assert CliRunner().invoke(main, ["extract", *common, "--for", "probe"]).exit_code == 0
    return ["compare", *common, "--epochs", "1", "--out", str(tmp_path / "runs")]


def test_what_cannot_be_compared_is_said_before_anything_is_trained(probed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    for words, what in (
        (["--tuners", "probe,lst", "--reduction", "4"], "--for probe,lst"),
        (["--tuners", "probe,e3va"], "no form"),
        (["--tuners", "probe,lora"], "baselines"),
        (["--tuners", "probe", "--csv", str(tmp_path / "no" / "table.csv")], "no such folder"),
        (["--tuners", "probe", "--seeds", "0,x"], "'x'"),
        (["--tuners", "probe", "--seeds", "0,-1"], "'-1'"),
        (["--tuners", "probe", "--seeds", ","], "at least one"),
        (["--tuner", "probe"], "--tuners"),
        (["--tuners", "probe", "--seed", "1"], "--seeds"),
    ):
        result = CliRunner().invoke(main, [*probed, *words])
        assert result.exit_code == 2 and what in result.stderr and "Traceback" not in result.output, (words, result)
        assert isinstance(result.exception, SystemExit)
    assert not (tmp_path / "runs").exists()


def test_a_seed_counts_once_and_a_recipe_may_say_it(probed, tmp_path):
    result = CliRunner().invoke(main, [*probed, "--tuners", "probe,probe", "--seeds", "0,1,0", "--json"])
    assert [r["seeds"] for r in json.loads(result.stdout)["rows"]] == [2]
    (tmp_path / "recipe.yaml").write_text("seed: 3\n")
    result = CliRunner().invoke(main, [*probed, "--tuners", "probe", "--recipe", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0 and (tmp_path / "runs" / "probe-s3").is_dir()


def test_a_table_that_cannot_be_written_does_not_cost_the_result(probed, tmp_path):
    (tmp_path / "table.csv").mkdir()
    result = CliRunner().invoke(main, [*probed, "--tuners", "probe", "--csv", str(tmp_path / "table.csv")])
    assert result.exit_code == 0 and "warning: --csv" in result.stderr and "probe" in result.stdout


def test_compare_sets_baselines_beside_tuners_on_a_t5_too(checkpoints, table, tmp_path):
    common = ["--model", str(checkpoints["t5"]), "--task", str(table), "--text", "first", "--text-pair", "second",
              "--label", "label", "--store", str(tmp_path / "store")]  # fmt: skip
    invoke = CliRunner().invoke
    assert invoke(main, ["extract", *common, "--for", "sherl,probe"]).exit_code == 0
    options = [
        "--tuners",
        "sherl,lora,prompt,full",
        "--max-steps",
        "2",
        "--reduction",
        "4",
        "--out",
        str(tmp_path / "runs"),
    ]
    result = invoke(main, ["compare", *common, *options, "--json"])
    assert result.exit_code == 0, result.output
    by = {r["method"]: r for r in json.loads(result.stdout)["rows"]}
    assert by["prompt"]["trainable"] == 20 * 32 and by["full"]["share"] == 1.0
    # Rank 8 on the queries and values of 4 encoder and 8 decoder attentions, no head of its own.
    assert by["lora"]["trainable"] == 12 * 2 * 2 * 8 * 32
