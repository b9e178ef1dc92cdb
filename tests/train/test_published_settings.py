"""The baselines as LST and SHERL set them beside themselves: their counts at T5-base, and that they train."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from pipeline.cost.flops import backbone_model
from pipeline.cost.known_shapes import known_config
from pipeline.extract.backbones import backbone_for
from pipeline.extract.pretrained import Checkpoint
from pipeline.lookup.objective import class_objective
from pipeline.store.errors import UserError
from pipeline.train.baselines.methods import PAPER, BaselineModel, baseline
from pipeline.train.tuners import tuner_class
from tests.pipeline.test_compare import trains_only_its_own
from tests.pipeline.test_errors import refused, run
from tests.train.conformance import Case

TOTAL = 222_882_048  # T5-base with the embedding of the tokenizer's 32,100 rows, as the released code has it
COUNTS = {"adapter": 3_625_728, "lora": 3_821_412, "bitfit": 282_468, "prompt": 76_800, "full": TOTAL}
SHARES = {"adapter": 1.63, "lora": 1.71, "bitfit": 0.13, "prompt": 0.03, "full": 100.0}


@pytest.mark.parametrize("name", PAPER)
def test_counts_at_t5_base_are_the_published_ones(name):
    config = known_config("t5-base")
    config.vocab_size = 32_100
    backbone = backbone_for(config)
    model = backbone_model(backbone)
    assert sum(p.numel() for p in model.parameters()) == TOTAL
    made = BaselineModel(
        baseline(name, "paper"), backbone, model, class_objective(backbone, tuner_class("sherl"), ((3, 1), (4, 1)))
    )
    assert made.trainable_parameters() == COUNTS[name]
    assert round(100 * COUNTS[name] / TOTAL, 2) == SHARES[name]
    assert baseline(name, "paper").lr_text == (0.3 if name == "prompt" else 3e-4)


@pytest.mark.parametrize("name", PAPER)
def test_they_train_what_they_say_from_the_backbone(checkpoints, pictures, name):
    case = Case(Checkpoint(checkpoints["t5"], "t5"), "sherl", pictures)
    module = case.backbone.load(case.checkpoint.folder, torch.float32, "sdpa", "cpu")
    chains = case.chains
    batch = case.backbone.with_decoder(
        case.inputs, [[case.backbone.start_id, *chains[2][:-1]]] * len(case.inputs)
    ).batch()
    batch.targets = {"label": torch.full((len(batch),), 2)}
    plain = BaselineModel(baseline("full"), case.backbone, module, case.objective, 0).eval().loss(batch)
    plain = float(plain.detach())
    model = BaselineModel(baseline(name, "paper"), case.backbone, module, case.objective, 0)
    if name != "prompt":  # adapters start near the identity, the others at it
        assert float(model.eval().loss(batch).detach()) == pytest.approx(plain, rel=1e-2 if name == "adapter" else 1e-6)
    model.loss(batch).backward()
    still = {n for n, p in model.named_parameters() if p.requires_grad and not (p.grad is not None and p.grad.any())}
    # A key's bias adds the same to all scores of a query; a factor at zero hides its partner; of the others none.
    assert all("k.bias" in n or "lora_A" in n for n in still), still
    model.zero_grad()
    trains_only_its_own(model, batch)


def test_biases_of_bitfit_are_where_they_should_be(checkpoints, pictures):
    """Adding b to a bias adds it to the module's output: on Linears, on norms, and on the columns of the head."""
    case = Case(Checkpoint(checkpoints["t5"], "t5"), "sherl", pictures)
    module = case.backbone.load(case.checkpoint.folder, torch.float32, "sdpa", "cpu")
    model = BaselineModel(baseline("bitfit", "paper"), case.backbone, module, case.objective).eval()
    x = torch.randn(3, 32)
    shift = torch.randn(32)
    for part in (module.decoder.final_layer_norm, module.encoder.block[1].layer[0].SelfAttention.q):
        before = part(x).clone()
        part.bias.data += shift
        torch.testing.assert_close(part(x), before + shift)
    tokens, head = torch.tensor([5, 2, 9]), torch.randn(module.lm_head.bias.shape)
    before, some = model.tuner.logits(x), model.tuner.logits(x, tokens)
    module.lm_head.bias.data += head
    torch.testing.assert_close(model.tuner.logits(x), before + head)
    torch.testing.assert_close(model.tuner.logits(x, tokens), some + head[tokens])
    torch.testing.assert_close(model.tuner.logits(x), module.lm_head(x * 32**-0.5))


def test_what_the_papers_do_not_have_is_refused(checkpoints, pictures):
    with pytest.raises(UserError, match="norm-tuning"):
        baseline("norm-tuning", "paper")
    case = Case(Checkpoint(checkpoints["bert"], "bert"), "probe", pictures)
    module = case.backbone.load(case.checkpoint.folder, torch.float32, "sdpa", "cpu")
    for name in PAPER:
        with pytest.raises(UserError, match="for T5"):
            BaselineModel(baseline(name, "paper"), case.backbone, module, case.objective)


def test_a_table_says_with_which_settings_it_was_made(checkpoints, table, tmp_path):
    common = ["--task", table, "--text", "first", "--label", "label", "--store", tmp_path / "store", "--limit", 16]
    t5, bert = (["--model", checkpoints[f], *common] for f in ("t5", "bert"))
    assert run("extract", *t5, "--for", "sherl,probe").exit_code == 0
    options = ["--preset", "paper", "--max-steps", 1, "--reduction", 4, "--batch-size", 8, "--seeds", 0]
    where = ["--out", tmp_path / "runs", "--csv", tmp_path / "t.csv"]
    result = run("compare", *t5, "--tuners", "sherl,lora,prompt", *options, *where, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    by = {r["method"]: r["settings"] for r in found["rows"]}
    assert found["preset"] == "paper"
    assert "rank 32" in by["lora"] and "lr 0.0003" in by["lora"] and "lr 0.3" in by["prompt"] and "100" in by["prompt"]
    assert "reduction 4" in by["sherl"] and "lr 0.003" in by["sherl"] and "batch 8" in by["sherl"]
    with (tmp_path / "t.csv").open() as file:
        assert {r["method"]: r["settings"] for r in csv.DictReader(file)} == by
    shown = run("compare", *t5, "--tuners", "lora", "--max-steps", 1, "--out", tmp_path / "more")
    assert "--preset ours" in shown.stdout and "rank 8" in shown.stdout and "lr 0.001" in shown.stdout
    assert run("extract", *bert, "--for", "probe").exit_code == 0
    refused(run("compare", *bert, "--tuners", "probe,lora", "--preset", "paper", "--out", tmp_path / "no"), "for T5")
    refused(run("compare", *t5, "--tuners", "partial-1", "--preset", "paper", "--out", tmp_path / "no"), "no partial-1")
    assert not (tmp_path / "no").exists()
