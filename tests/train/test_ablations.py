"""SHERL's published ablations: how layers are blended (Fig. 4), and no live layer (Fig. 5)."""

from __future__ import annotations

import pytest
import torch

from pipeline.extract.pretrained import Checkpoint
from pipeline.store import UserError
from pipeline.train.tuners import tuner_config
from pipeline.train.tuners.mtsa import MTSA, learned, mix
from tests.train.conformance import Case

ROWS, LAYERS, D = 5, 3, 8


def features() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(ROWS, LAYERS, D), torch.randn(ROWS, D)


def test_self_attention_over_layers_has_four_heads_and_is_averaged():
    layers, guide = features()
    own = learned("mhsa", LAYERS, D)
    x, weights = layers.double(), {n: p.double() for n, p in own.named_parameters()}
    q, k, v = (x @ weights["in_proj_weight"].T + weights["in_proj_bias"]).chunk(3, -1)
    heads = []
    for at in range(0, D, D // 4):
        a, b, c = (t[..., at : at + D // 4] for t in (q, k, v))
        heads.append((a @ b.transpose(1, 2) / (D // 4) ** 0.5).softmax(-1) @ c)
    attended = torch.cat(heads, -1) @ weights["out_proj.weight"].T + weights["out_proj.bias"]
    found = mix(layers, guide, None, "mhsa", own)
    torch.testing.assert_close(found.double(), attended.mean(1) + guide, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="the 4 heads of mhsa do not divide the side width 6"):
        MTSA([24] * 3, 6, blend="mhsa")


def test_a_learned_redundancy_starts_at_one_and_divides_the_scores():
    layers, guide = features()
    score, own = torch.nn.Linear(D, 1), learned("linear-learned", LAYERS, D)
    torch.testing.assert_close(mix(layers, guide, score, "linear-learned", own), mix(layers, guide, score, "linear"))
    own.data = torch.tensor([0.5, -2.0, 3.0])  # training may make one negative
    scores = (layers * guide[:, None] * score.weight[0]).sum(-1) + score.bias
    weights = scores.relu() / own
    weights = weights / (weights.abs().sum(1, keepdim=True) + 1e-6)
    expected = (weights[..., None] * layers).sum(1) + guide
    torch.testing.assert_close(mix(layers, guide, score, "linear-learned", own), expected)


def test_one_learned_redundancy_an_early_layer():
    m = MTSA([24] * 5, 8, blend="linear-learned")
    assert torch.equal(m.learned, torch.ones(4))
    more = {"mhsa": 4 * (D * D + D) - (D + 1), "linear-learned": 4, "max": -(D + 1)}  # against the method's own
    count = {b: sum(p.numel() for p in MTSA([24] * 5, D, blend=b).parameters()) for b in (*more, "redundancy")}
    assert {b: count[b] - count["redundancy"] for b in more} == more


@pytest.mark.parametrize("blend", ["mhsa", "linear-learned"])
@pytest.mark.parametrize("backbone", ["t5", "vit", "resnet"])
def test_they_train_on_every_shape(checkpoints, pictures, backbone, blend):
    case = Case(Checkpoint(checkpoints[backbone], backbone), "sherl", pictures)
    case.config = tuner_config("sherl", {"reduction": 4, "blend": blend})
    model = case.model().train()
    for name, p in model.named_parameters():  # T5's form starts with scores so small that ReLU may take all of a row
        if "score" in name:
            p.data = torch.ones_like(p)
    model.loss(case.batch()).backward()
    own = {n: p for n, p in model.named_parameters() if ".learned" in n}
    assert own and all(p.grad is not None and torch.isfinite(p.grad).all() for p in own.values())
    assert any(p.grad.abs().sum() > 0 for p in own.values())


@pytest.mark.parametrize("backbone", ["t5", "bert", "vit"])
def test_without_a_live_layer_the_blend_is_the_output(checkpoints, pictures, backbone, monkeypatch):
    case = Case(Checkpoint(checkpoints[backbone], backbone), "sherl", pictures)
    case.config = tuner_config("sherl", {"reduction": 4, "insert": "none", "gate": 0.1})
    model, batch = case.model().eval(), case.batch()
    tuner = model.tuner
    monkeypatch.setattr(tuner.tail, "through", lambda *_: pytest.fail("a layer ran"))
    stream, depth = tuner.stream, case.backbone.depth(tuner.stream)
    assert {n.split(".")[0] for n in batch.states} == {stream} and f"{stream}.{depth - 1}" not in batch.states
    names = [n for n in case.backbone.states() if n in batch.states and n not in case.backbone.embedding(stream)]
    layers = [tuner.tail.embed(batch, stream), *(batch.states[n] for n in names)]
    blend = tuner.mtsa[stream](layers, layers[-1])
    torch.testing.assert_close(tuner(batch)[stream], tuner.norm[stream](blend))


def test_biases_on_a_t5_start_as_nothing_and_count_in_training_too(checkpoints, pictures):
    """The live layer has a cheaper way through its cross-attention while training; both see the biases."""
    frozen, free = (Case(Checkpoint(checkpoints["t5"], "t5"), "sherl", pictures) for _ in range(2))
    for case, tail in ((frozen, "frozen"), (free, "bitfit")):
        case.config = tuner_config("sherl", {"reduction": 4, "tail": tail})
    model, plain, batch = free.model(), frozen.model(), frozen.batch()
    torch.testing.assert_close(model.eval()(batch), plain.eval()(batch), rtol=0, atol=0)
    inside = {n: p for n, p in model.named_parameters() if ".live." in n and p.requires_grad}
    assert len(inside) == 8 + 2 + 3 and all(n.endswith("bias") for n in inside)  # attentions, feed-forward, norms
    for n, p in inside.items():
        p.data.normal_() if "layer_norm" in n or ".v." in n else p.data.zero_()
    found = []
    for mode in (True, False):
        model.train(mode)
        for module in (*model.modules(), *model.tuner.tail.modules()):
            if hasattr(module, "p"):
                module.p = 0.0
            if hasattr(module, "n_heads"):
                module.dropout = 0.0
        found.append(model(batch))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[1]["decoder"], plain(batch)["decoder"])
