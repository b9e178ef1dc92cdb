"""Live counterparts, and the table that sets them beside tuners."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from click.testing import CliRunner

from extract.checkpoint import Checkpoint
from pipeline.cli import main
from store import UserError
from tests.train.conformance import Case
from train.counterparts import COUNTERPARTS, CounterpartModel, counterpart
from train.model import Target

TWO = Target("classification", 3)


def made(checkpoints, pictures, family: str, name: str):
    case = Case(Checkpoint(checkpoints[family], family), "probe", pictures)
    backbone = case.family.load(case.checkpoint.folder, torch.float32, "sdpa", "cpu")
    return case, CounterpartModel(counterpart(name), case.family, backbone, TWO, 0)


@pytest.mark.parametrize("name", COUNTERPARTS)
@pytest.mark.parametrize("family", ["bert", "vit", "clip", "cifar", "swin"])
def test_a_counterpart_trains_what_it_says_and_starts_at_the_backbone(checkpoints, pictures, family, name):
    if (family == "cifar" and name in ("lora", "adapter")) or (family == "swin" and name == "adapter"):
        with pytest.raises(UserError, match=name):
            made(checkpoints, pictures, family, name)
        return
    case, model = made(checkpoints, pictures, family, name)
    inputs = case.inputs
    batch = inputs.batch()
    batch.labels = torch.arange(len(batch)) % 3
    probe = case.model().eval()
    torch.testing.assert_close(model.eval()(batch), probe(case.batch()), rtol=1e-4, atol=1e-5)
    frozen = {k: p.detach().clone() for k, p in model.backbone.named_parameters() if not p.requires_grad}
    before = model.trainable_state()
    before = {k: v.clone() for k, v in before.items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # a factor that starts at zero hides its partner's gradient in the first step
        optimizer.zero_grad()
        model.train().loss(batch).backward()
        optimizer.step()
    after = model.trainable_state()
    assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith("backbone."))
    now = dict(model.backbone.named_parameters())
    assert all(torch.equal(now[k], v) for k, v in frozen.items())
    if name != "full":
        assert frozen and model.trainable_parameters() < sum(p.numel() for p in model.parameters())
    model.load_trainable(before)
    assert all(torch.equal(v, model.trainable_state()[k]) for k, v in before.items())


def test_text_to_text_backbones_say_that_they_have_none(checkpoints):
    checkpoint = Checkpoint(checkpoints["t5"], "t5")
    backbone = checkpoint.family.load(checkpoint.folder, torch.float32, "sdpa", "cpu")
    with pytest.raises(UserError, match="run on encoders"):
        CounterpartModel(counterpart("full"), checkpoint.family, backbone, TWO)
    with pytest.raises(UserError, match="did you mean lora"):
        counterpart("lorra")


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
    assert by["full"]["share"] > 0.9 and by["full"]["live"] and not by["sherl"]["live"]
    assert all(r["memory_bytes"] > 0 and r["seconds_per_epoch"] > 0 and r["seeds"] == 2 for r in rows)
    assert by["probe"]["memory_bytes"] < by["full"]["memory_bytes"]
    with (tmp_path / "table.csv").open() as file:
        assert [r["method"] for r in csv.DictReader(file)] == list(by)
    shown = invoke(main, ["compare", *common, "--tuners", "probe", "--epochs", "1", "--out", str(tmp_path / "more")])
    assert "method" in shown.stdout and "probe" in shown.stdout and shown.exit_code == 0
    refused = invoke(main, ["compare", *common, "--tuners", "probe,sherrl"])
    assert refused.exit_code != 0 and "unknown 'sherrl'" in refused.stderr
