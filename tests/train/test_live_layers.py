"""SHERL with more than the last layer live (Figs 6, 9), and with something trainable inside the live layers (Fig 5)."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config

from pipeline.extract.backbones import backbone_for
from pipeline.extract.pretrained import Checkpoint
from pipeline.lookup.objective import class_objective
from pipeline.store import UserError
from pipeline.train.model import Model, tail_for
from pipeline.train.tuners import fitting_tuner, tuner_class, tuner_config
from tests.train.conformance import CHECKS, Case, parameters_are_those_of_the_formula
from tests.train.test_tuners import CHAINS, T5

VARIANTS = [{"insert": "single:1"}, {"insert": "multi:1"}, {"insert": "none"}] + [
    {"tail": t} for t in ("lora", "bitfit", "adapter", "prompt")
]
VARIANTS += [{"insert": "multi:1", "tail": "lora"}]


def case_of(checkpoints, pictures, backbone: str, **options) -> Case:
    case = Case(Checkpoint(checkpoints[backbone], backbone), "sherl", pictures)
    case.config = tuner_config("sherl", {"reduction": 4, **options})
    return case


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("backbone", ["t5", "bert", "clip_text", "vit"])
def test_every_variant_goes_through_the_suite(checkpoints, pictures, backbone, options):
    case = case_of(checkpoints, pictures, backbone, **options)
    for check in CHECKS:
        if check is not parameters_are_those_of_the_formula:  # counted below
            check(case)


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(o.values()))
def test_what_is_saved_is_what_is_trained_and_it_all_learns(checkpoints, pictures, options):
    case = case_of(checkpoints, pictures, "bert", **options)
    model, batch = case.model(), case.batch()
    saved = {k: v.clone() for k, v in model.trainable_state().items()}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert saved.keys() == trained.keys()
    assert model.trainable_parameters() == sum(v.numel() for v in saved.values())
    shared = {n: p.detach().clone() for n, p in model.tuner.tail.named_parameters()}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.train().loss(batch).backward()
        optimizer.step()
    inside = {k: v for k, v in model.trainable_state().items() if ".live." in k}
    assert bool(inside) == ("tail" in options)
    # A key's bias adds the same to all scores of a query, which softmax takes away again.
    moved = {n: p.grad.abs().sum() > 0 for n, p in trained.items() if ".live." in n and "key.bias" not in n}
    assert all(moved.values()), [n for n, m in moved.items() if not m]
    assert all(torch.equal(v, dict(model.tuner.tail.named_parameters())[n]) for n, v in shared.items())
    assert all(torch.equal(v, dict(model.named_parameters())[n]) for n, v in frozen.items())


@pytest.mark.parametrize("backbone", ["bert", "vit"])
def test_late_layers_are_those_of_the_backbone(checkpoints, pictures, backbone):
    """With the gate wide open and nothing blended in, a single insertion is the backbone itself from that layer on."""
    case = case_of(checkpoints, pictures, backbone, insert="single:1", gate=9.0)
    model, batch = case.model().eval(), case.batch()
    assert "encoder.1" not in batch.states and "encoder.0" in batch.states
    up = model.tuner.mtsa["encoder"].up
    up.weight.data.zero_(), up.bias.data.zero_()
    state = f"encoder.{case.backbone.depth('encoder') - 1}"
    last = case.backbone.run(case.loaded, case.inputs.batch(), [state])[state]
    torch.testing.assert_close(
        model.tuner(batch)["encoder"], model.tuner._finish(last, "encoder"), rtol=1e-4, atol=1e-4
    )


def test_a_late_t5_layer_is_the_backbones_own(checkpoints):
    backbone = Checkpoint(checkpoints["t5"], "t5").backbone
    model = backbone.load(checkpoints["t5"], torch.float32, "sdpa", "cpu")
    block = backbone.late_block(backbone.block_weights(model, 2), "sdpa").eval()
    grid, memory = torch.randn(2, 3, 32), torch.randn(2, 5, 32)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    own, bias = torch.ones(2, 1, 3, 3, dtype=torch.bool).tril(), torch.randn(1, 4, 3, 3)
    arguments = (own, bias, memory, mask, torch.zeros(1, 4, 3, 5))
    assert torch.equal(block(grid, *arguments)[0], model.decoder.block[2](grid, *arguments)[0])
    assert not any(p.requires_grad for p in block.parameters())


def counted(options: dict) -> int:
    backbone = backbone_for(T5Config(vocab_size=32128, **T5["t5-base"]))
    config = tuner_config("sherl", {"reduction": 8, **options})
    objective = class_objective(backbone, tuner_class("sherl"), CHAINS)
    with torch.device("meta"):
        model = Model.build("sherl", config, backbone, tail_for("sherl", config, backbone, "sdpa"), objective)
    return model.trainable_parameters()


def test_parameters_on_t5_base():
    whole, d, wide = 1_907_236, 96, 768
    low = wide // 16  # Fig 5: reduction 16
    assert counted({"tail": "lora"}) - whole == 2 * 2 * 2 * wide * low  # q and v of two attentions
    assert counted({"tail": "adapter"}) - whole == 2 * wide * low + low + wide
    assert counted({"tail": "prompt"}) - whole == 30 * wide
    assert counted({"tail": "bitfit"}) - whole == 8 * wide + (4 * wide + wide) + 3 * wide  # attentions, ff, norms
    assert counted({"tail": "lora", "tail_size": 8}) - whole == 2 * 2 * 2 * wide * 8
    assert counted({"tail": "adapter", "tail_size": 3}) - whole == 2 * wide * 3 + 3 + wide
    assert counted({"tail": "prompt", "tail_size": 20}) - whole == 20 * wide
    a_set, a_stack = wide * d + d + 2 * (d * d + d), (d + 1) + 1 + (d * wide + wide)
    # Without a live layer nothing reads the encoder's blend.
    assert counted({"insert": "none"}) == 9 * a_set + a_stack + wide
    # From layer 9: embedding, 1, 2, 3, 5, 6, 7 and the guide 8; later layers add what came before.
    assert counted({"insert": "single:9"}) == (10 + 8) * a_set + 2 * a_stack + 2 * wide
    assert counted({"insert": "multi:9"}) == (10 + 8 + 9 + 10) * a_set + 4 * a_stack + 2 * wide


def test_only_earlier_states_are_read_and_bad_values_are_refused(checkpoints):
    backbone = backbone_for(T5Config(vocab_size=64, **T5["t5-base"]))
    states = tuner_class("sherl").states(tuner_config("sherl", {"insert": "multi:9"}), backbone)
    assert [s for s in states if s.startswith("decoder")] == [f"decoder.{i}" for i in (1, 2, 3, 5, 6, 7, 8)]
    assert "encoder.11" in states
    for bad in ("multi", "single:x", "first"):
        with pytest.raises(UserError, match="insert: last, none, or single:S or multi:S"):
            tuner_config("sherl", {"insert": bad})
    for number in (0, 12):
        with pytest.raises(UserError, match=f"layers 1 to 11 of this backbone, not {number}"):
            tuner_class("sherl").states(tuner_config("sherl", {"insert": f"single:{number}"}), backbone)
    for bad, message in (
        ({"tail": "thawed"}, "tail: one of frozen, lora"),
        ({"tail": "lora", "insert": "none"}, "tail: with insert none no layer is live that lora could train in"),
        ({"tail_size": 8}, "tail_size: a number above 0, with tail lora or adapter or prompt; tail is frozen"),
        ({"tail_size": 8, "tail": "bitfit"}, "tail is bitfit"),
    ):
        with pytest.raises(UserError, match=message):
            tuner_config("sherl", bad)
    swin = Checkpoint(checkpoints["swin"], "swin").backbone
    config = tuner_config("sherl", {"reduction": 4, "insert": "multi:1"})
    with pytest.raises(UserError, match="insert: swin backbones take last only"):
        fitting_tuner("sherl", config, swin)


def test_a_copied_layer_computes_as_the_shared_one_in_either_mode(checkpoints, pictures):
    """BERT's attention is chosen by mode in a configuration, of which a copy of the layer has its own."""
    case = case_of(checkpoints, pictures, "bert", tail="lora", gate=0.1)
    plain, batch = case_of(checkpoints, pictures, "bert", gate=0.1), case.batch()
    shared = plain.model().train()
    shared(batch)  # leaves the shared layer in its mode for training
    model = Model.build("sherl", case.config, case.backbone, shared.tuner.tail, case.objective, 0).eval()
    torch.testing.assert_close(model(batch), shared.eval()(batch), rtol=1e-5, atol=1e-6)
