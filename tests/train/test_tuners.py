"""Tuners: exact parameter counts at the papers' shapes, the mathematics of MTSA, no gradient on frozen weights."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, T5Config, TimmWrapperConfig

from pipeline.extract.backbones import backbone_for
from pipeline.extract.pretrained import Checkpoint
from pipeline.lookup.objective import class_objective
from pipeline.store import UserError
from pipeline.train.configs import BLENDS
from pipeline.train.features import Want
from pipeline.train.model import Model
from pipeline.train.tuners import Tuner, TunerConfig, register_tuner, tuner_class, tuner_config, tuner_names
from pipeline.train.tuners.base import StateLinear
from pipeline.train.tuners.clip import SherlTower, UniptTower
from pipeline.train.tuners.mtsa import MTSA, layer_weights, redundancy
from tests.extract.test_backbones import inputs_of
from tests.train.conformance import Case

T5 = {
    "t5-base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "t5-large": {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
    "t5-3b": {"d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_layers": 24, "num_heads": 32},
}
COUNTS = {
    ("sherl", "t5-base"): 1_907_236,
    ("sherl", "t5-large"): 4_700_548,
    ("sherl", "t5-3b"): 1_087_620,
    ("lst", "t5-base"): 3_878_712,
    ("lst", "t5-large"): 9_057_328,
    ("lst", "t5-3b"): 2_494_896,
}
CHAINS = ((5, 1), (6, 1))


def counted(tuner: str, options, backbone) -> Model:
    """On the meta device."""
    objective = class_objective(backbone, tuner_class(tuner, backbone), CHAINS)
    with torch.device("meta"):
        return Model.build(tuner, tuner_config(tuner, options), backbone, backbone.tail(None, "sdpa"), objective)


@pytest.mark.parametrize(("tuner", "shape"), COUNTS)
def test_parameters_of_the_papers(tuner, shape):
    backbone = backbone_for(T5Config(vocab_size=32128, **T5[shape]))
    model = counted(tuner, {"reduction": 8}, backbone)
    assert model.trainable_parameters() == COUNTS[tuner, shape]


@pytest.mark.parametrize(("tuner", "count"), [("sherl", 158_740), ("lst", 299_192), ("probe", 770), ("unipt", 152_115)])
def test_parameters_on_minilm(tuner, count):
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    backbone = backbone_for(config)
    model = counted(tuner, {}, backbone)
    assert model.trainable_parameters() == count


@pytest.mark.parametrize(
    ("name", "alpha", "count"),
    [
        ("base", 8, 1_195_008),
        ("base", 16, 2_350_080),
        ("base", 32, 4_660_224),
        ("large", 8, 1_792_512),
        ("large", 16, 3_525_120),
        ("large", 32, 6_990_336),
    ],
)
def test_parameters_of_e3va(name, alpha, count):
    backbone = backbone_for(TimmWrapperConfig(architecture=f"swin_{name}_patch4_window12_384"))
    tuner = tuner_class("e3va", backbone)
    with torch.device("meta"):
        made = tuner(tuner_config("e3va", {"alpha": alpha}), backbone, backbone.tail(None, "sdpa"), Want())
    assert sum(p.numel() for p in made.parameters()) == count


@pytest.mark.parametrize(("tower", "count"), [(SherlTower, 9_597_980), (UniptTower, 9_584_642)])
def test_parameters_on_clip4clip(tower, count):
    with torch.device("meta"):
        both = [tower(768, 512, 13, 512), tower(512, 512, 13, 512)]
    assert sum(p.numel() for t in both for p in t.parameters()) == count


def test_e3va_without_corrections_follows_the_backbone(checkpoints, pictures):
    checkpoint = Checkpoint(checkpoints["swin"], "swin")
    backbone = checkpoint.backbone
    case = Case(checkpoint, "e3va", pictures)
    tuner, batch = case.model().tuner, case.batch()
    e = batch.states["stage1.in"]
    for number, stream in enumerate(backbone.streams):
        e = tuner.tail.merge(e, number - 1, batch) if number else e
        for i in range(backbone.depth(stream)):
            e = e + tuner.adapters[f"{stream}_{i}_msa"](batch.states[f"{stream}.{i}.msa"])
            e = e + tuner.adapters[f"{stream}_{i}_mlp"](batch.states[f"{stream}.{i}.mlp"])
        torch.testing.assert_close(e, batch.states[f"{stream}.{backbone.depth(stream) - 1}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"start": "zero"}, {"fusion": "highway"}, {"zero_init": False}])
def test_the_choices_of_e3va_differ(checkpoints, pictures, options):
    checkpoint = Checkpoint(checkpoints["swin"], "swin")
    case = Case(checkpoint, "e3va", pictures)
    usual = case.model()(case.batch())
    case = Case(checkpoint, "e3va", pictures)
    case.config = tuner_config("e3va", {"alpha": 2, **options})
    other = case.model()(case.batch())
    assert other.keys() == usual.keys() and any(not torch.allclose(other[s], usual[s]) for s in usual)


def built(checkpoints, backbone_name: str, tuner: str, seed: int = 0):
    checkpoint = Checkpoint(checkpoints[backbone_name], backbone_name)
    backbone = checkpoint.backbone
    module = backbone.load(checkpoint.folder, torch.float32, "sdpa", "cpu")
    tail = backbone.tail(backbone.tail_weights(module), "sdpa")
    candidates = (
        tuple(tuple(c) for c in backbone.candidates(checkpoint.tokenizer, ["0", "1", "2 3"]))
        if backbone.name == "t5"
        else ()
    )
    config = tuner_config(tuner, {"reduction": 4})
    model = Model.build(
        tuner,
        config,
        backbone,
        tail,
        class_objective(backbone, tuner_class(tuner, backbone), candidates or [()] * 3),
        seed,
    )
    batch = inputs_of(checkpoint, 6).batch()
    batch.states = backbone.run(module, batch, tuner_class(tuner).states(config, backbone))
    batch.targets = {"label": torch.arange(6) % 3}
    return model, batch


def mtsa_by_formula(m: MTSA, features: list[torch.Tensor], last: torch.Tensor) -> torch.Tensor:
    """methods §1.1 written out token by token in float64, with the released code's epsilons."""
    d = m.up.in_features
    out = []
    for row in range(len(last)):
        refined = []
        for i, h in enumerate(features):
            f = torch.relu(m.down[i].weight.double() @ h[row].double() + m.down[i].bias.double())
            both = f @ m.mix_weight[i].double() + m.mix_bias[i, 0].double()
            refined.append((both[:d] + f) * torch.sigmoid(both[d:]))
        layers, guide = torch.stack(refined[:-1]), refined[-1]
        unit = layers / (layers.norm(dim=1, keepdim=True) + 1e-6)
        r = torch.relu(unit @ unit.T).sum(1)
        s = torch.stack([(m.score.weight[0].double() * (e * guide)).sum() + m.score.bias[0].double() for e in layers])
        weights = torch.relu(s) / r
        weights = weights / (weights.abs().sum() + 1e-6)
        blended = (weights[:, None] * layers).sum(0) + guide
        up = m.up.weight.double() @ torch.relu(blended) + m.up.bias.double()
        out.append(up + torch.tanh(m.gate.double() / 0.1) * last[row].double())
    return torch.stack(out)


def test_mtsa_is_the_formula():
    torch.manual_seed(0)
    m = MTSA([24] * 5, 6, gate=0.03)
    for p in m.parameters():
        if p.ndim:
            p.data = torch.randn_like(p) * 0.5
    features = [torch.randn(11, 24) for _ in range(5)]
    found = m(features, features[-1])
    torch.testing.assert_close(found.double(), mtsa_by_formula(m, features, features[-1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blend", BLENDS)
def test_every_blend_trains_and_the_ablations_differ(blend):
    torch.manual_seed(0)
    m = MTSA([16] * 4, 4, blend=blend)
    for p in m.parameters():
        p.data = torch.randn_like(p) * 0.5
    features = [torch.randn(9, 16) for _ in range(4)]
    out = m(features, features[-1])
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters())
    if blend != "redundancy":
        m.blend = "max" if blend == "average" else "average"
        assert not torch.allclose(out, m(features, features[-1]))


def unipt_by_formula(t, sources: list[torch.Tensor], lengths: list[int]) -> torch.Tensor:
    """methods §3 written out sample by sample in float64."""
    t = t.double()
    low = [down(h.double()) for down, h in zip(t.down, sources, strict=True)]
    out, start = [], 0
    for n in lengths:
        rows = [x[start : start + n] for x in low]
        anchor, targets = rows[-1], rows[:-1]
        confidence = torch.stack([t.aggregate.confidence(anchor.mean(0) * x.mean(0))[0] for x in targets]).softmax(0)
        total = torch.zeros_like(anchor)
        for share, x in zip(confidence, targets, strict=True):
            w = torch.relu(anchor @ x.T)
            total = total + share * ((w / (w.sum(1, keepdim=True) + 1e-6) + torch.eye(n, dtype=w.dtype)) @ x)
        out.append(t.up(torch.relu(anchor + t.aggregate.project(total))))
        start += n
    return torch.cat(out)


def test_unipt_is_the_formula(checkpoints):
    model, batch = built(checkpoints, "bert", "unipt")
    model.eval()
    (found,) = model(batch).values()
    sources = [model.tuner.tail.embed(batch, "encoder"), *(batch.states[f"encoder.{i}"] for i in range(4))]
    expected = unipt_by_formula(model.tuner, sources, batch.lengths["encoder"].tolist())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("mixed", [False, True])
def test_recomputing_changes_no_number(monkeypatch, dtype, mixed):
    monkeypatch.setattr("pipeline.train.tuners.mtsa.CHUNK_ROWS", 4)
    features, found = [torch.randn(11, 24).to(dtype) for _ in range(4)], []
    for recompute in (False, True):
        torch.manual_seed(0)
        m = MTSA([24] * 4, 6, gate=0.03, recompute=recompute)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            out = m(features, features[-1])
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in m.parameters())])
    for kept, computed in zip(*found, strict=True):
        torch.testing.assert_close(computed, kept)


@pytest.mark.parametrize("shape", [(11, 24), (2, 5, 24)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_state_is_kept_as_it_came(dtype, shape):
    """Gradients are those of a plain linear map of the widened state, and no wide copy is kept for them."""
    torch.manual_seed(0)
    layer, rows, kept = StateLinear(24, 6), torch.randn(shape).to(dtype), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = layer(rows)
    places = [t.untyped_storage().data_ptr() for t in kept if t.numel() == rows.numel()]
    assert places == [rows.untyped_storage().data_ptr()]
    (out**2).sum().backward()
    plain = torch.nn.Linear(24, 6)
    plain.load_state_dict(layer.state_dict())
    (plain(rows.float()) ** 2).sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(layer.get_parameter(name).grad, parameter.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(rows).dtype == torch.bfloat16


def test_mtsa_is_finite_at_zero_rows_with_finite_gradients():
    m = MTSA([8] * 4, 4)
    features = [torch.zeros(3, 8, requires_grad=True) for _ in range(4)]
    out = m(features, features[-1])
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in m.parameters() if p.grad is not None)


def test_redundancy_of_equal_orthogonal_and_zero_features():
    equal = torch.ones(1, 3, 4)
    torch.testing.assert_close(redundancy(equal), torch.full((1, 3), 3.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(redundancy(torch.eye(4)[None, :3]), torch.ones(1, 3), rtol=1e-4, atol=0)
    torch.testing.assert_close(redundancy(torch.zeros(2, 3, 4)), torch.ones(2, 3))
    assert layer_weights(torch.full((2, 3), -1.0), torch.ones(2, 3)).abs().sum() == 0


def test_mtsa_stays_in_float32_under_autocast():
    m = MTSA([8] * 3, 4)
    features = [torch.randn(5, 8).bfloat16() for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert m(features, features[-1]).dtype == torch.float32


def test_registering_checks_name_and_shape():
    with pytest.raises(ValueError, match="already"):
        register_tuner("sherl", TunerConfig)(tuner_class("sherl"))
    with pytest.raises(ValueError, match="subclass"):
        register_tuner("odd", TunerConfig)(torch.nn.Linear)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="description"):
        register_tuner("odd", TunerConfig)(type("Odd", (Tuner,), {"states": None}))
    assert "odd" not in tuner_names()


def test_options_are_refused_by_name():
    with pytest.raises(UserError, match="no option 'colour'"):
        tuner_config("lst", {"colour": 1})
    with pytest.raises(UserError, match="temperature"):
        tuner_config("sherl", {"temperature": 0})
    backbone = backbone_for(T5Config(vocab_size=64, **T5["t5-base"]))
    with pytest.raises(UserError, match="0 to 11, not 12"):
        tuner_class("lst").states(tuner_config("lst", {"layers": [1, 12]}), backbone)
