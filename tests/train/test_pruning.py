"""LST's pruned start: which channels stay, by a walk written out here, and the Fisher information it may choose by."""

from __future__ import annotations

import pytest
import torch

from pipeline.extract.pretrained import Checkpoint
from pipeline.store import UserError
from pipeline.train.importance import fisher, magnitude
from pipeline.train.sideblocks import pruned
from pipeline.train.tuners import fitting_tuner, tuner_class, tuner_config
from tests.train.conformance import Case

R = 4


def loaded(checkpoints, name: str):
    checkpoint = Checkpoint(checkpoints[name], name)
    return checkpoint.backbone, checkpoint.backbone.load(checkpoint.folder, torch.float32, "sdpa", "cpu")


def top(scores: list[float], keep: int) -> list[int]:
    pruned = sorted(range(len(scores)), key=lambda i: -scores[i])[keep:]
    return list(set(range(len(scores))) - set(pruned))  # the released order, see test_golden_pruning.py


def walk_by_hand(model) -> dict[str, torch.Tensor]:
    """methods §2.2, the running form by magnitude, on a T5 of width 32 with 4 heads of 8 and d_ff 64."""
    w = {n: p.detach().double() for n, p in model.named_parameters()}
    out = {}
    kept = top([float(w["shared.weight"][:, c].abs().sum()) for c in range(32)], 32 // R)

    def attention(at: str, to: str) -> None:
        nonlocal kept
        q, k, v = (w[f"{at}.{n}.weight"][:, kept] for n in "qkv")
        rows = top([float((q[i] * k[i] * v[i]).abs().sum()) for i in range(32)], 32 // R)
        for n, cut in zip("qkv", (q, k, v), strict=True):
            out[f"{to}.{n}.weight"] = cut[rows]
        kept = rows
        single(f"{at}.o", f"{to}.o", 32 // R)

    def single(at: str, to: str, keep: int) -> None:
        nonlocal kept
        cut = w[f"{at}.weight"][:, kept]
        kept = top([float(row.abs().sum()) for row in cut], keep)
        out[f"{to}.weight"] = cut[kept]

    for stream, kinds in (("encoder", ["SelfAttention"]), ("decoder", ["SelfAttention", "EncDecAttention"])):
        for i in range(4):
            at, to = f"{stream}.block.{i}.layer", f"{stream}.{i}.layer"
            for n, kind in enumerate(kinds):
                out[f"{to}.{n}.layer_norm.weight"] = w[f"{at}.{n}.layer_norm.weight"][kept]
                attention(f"{at}.{n}.{kind}", f"{to}.{n}.{kind}")
            n = len(kinds)
            out[f"{to}.{n}.layer_norm.weight"] = w[f"{at}.{n}.layer_norm.weight"][kept]
            single(f"{at}.{n}.DenseReluDense.wi", f"{to}.{n}.DenseReluDense.wi", 64 // R)
            single(f"{at}.{n}.DenseReluDense.wo", f"{to}.{n}.DenseReluDense.wo", 32 // R)
        out[f"{stream}.norm.weight"] = w[f"{stream}.final_layer_norm.weight"][kept]
        bias = "layer.0.SelfAttention.relative_attention_bias.weight"
        out[f"{stream}.0.{bias}"] = w[f"{stream}.block.0.{bias}"]
    return out


def unlike_norms(model) -> None:
    """Give every norm weights that tell its channels apart."""
    for name, p in model.named_parameters():
        if "norm" in name.lower() and name.endswith("weight"):
            p.data = 1 + torch.arange(float(len(p))) / 100


def test_running_set_on_a_t5_is_the_walk_by_hand(checkpoints):
    backbone, model = loaded(checkpoints, "t5")
    unlike_norms(model)
    found = pruned(backbone, model, magnitude(model), R, aligned=False)
    expected = walk_by_hand(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=0, atol=1e-7, msg=name)


def test_aligned_set_is_one_for_the_residual_stream_and_fair_to_heads(checkpoints):
    backbone, model = loaded(checkpoints, "t5")
    unlike_norms(model)
    found = pruned(backbone, model, magnitude(model), R, aligned=True)
    norms = [v for n, v in found.items() if "norm" in n]
    assert len(norms) == 4 * 2 + 4 * 3 + 2 and all(torch.equal(v, norms[0]) for v in norms)
    kept = [round(float(v - 1) * 100) for v in norms[0]]
    whole = dict(model.named_parameters())
    for kind in ("decoder.2.layer.1.EncDecAttention", "encoder.0.layer.0.SelfAttention"):
        stream, number, rest = kind.split(".", 2)
        at = f"{stream}.block.{number}.{rest}"
        for n in "qkv":  # 2 of the 8 rows of each head, in place
            columns = whole[f"{at}.{n}.weight"][:, kept]
            rows = [next(i for i in range(32) if torch.equal(columns[i], r)) for r in found[f"{kind}.{n}.weight"]]
            assert [r // 8 for r in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert torch.equal(found[f"{kind}.o.weight"], whole[f"{at}.o.weight"][kept][:, rows])


@pytest.mark.parametrize(("prune", "kept_as"), [("running", "released"), ("aligned", "aligned")])
@pytest.mark.parametrize("name", ["t5", "bert", "roberta", "vit", "vit_hf", "clip", "clip_text"])
def test_side_blocks_start_as_the_pruned_blocks_of_the_kept_layers(checkpoints, pictures, name, prune, kept_as):
    case = Case(Checkpoint(checkpoints[name], name), "lst", pictures)
    backbone = case.backbone
    case.config = tuner_config("lst", {"reduction": R, "init": "magnitude", "prune": prune, "layers": [1, 2]})
    start = tuner_class("lst", backbone).start(case.config, backbone)
    assert start.name == f"lst-magnitude-{kept_as}-r4" and not start.fisher
    weights = start.make(case.loaded, magnitude(case.loaded))
    model = case.model()
    before = {k: v.clone() for k, v in model.trainable_state().items()}
    model.tuner.begin(weights)
    after = model.trainable_state()
    assert all(torch.equal(before[k], after[k]) for k in after if ".side." not in k)
    fresh = {k for k in after if ".side." in k and torch.equal(before[k], after[k])}
    own = {f"tuner.ladders.{s}.side.blocks.{k}" for s in backbone.streams for k in (0, 1)}
    # What was 0 or 1 before and after (biases, norms) cannot tell; every matrix must have come from the backbone.
    assert not [k for k in fresh if after[k].ndim > 1]
    assert {
        k.rsplit(".blocks.", 1)[0] + ".blocks." + k.rsplit(".blocks.", 1)[1][0] for k in after if ".blocks." in k
    } == own
    stream = backbone.streams[-1]
    matrix = next(k for k, v in weights.items() if k.startswith(f"{stream}.2.") and v.ndim > 1)
    assert torch.equal(
        after[f"tuner.ladders.{stream}.side.blocks.1." + matrix.removeprefix(f"{stream}.2.")], weights[matrix]
    )
    assert torch.isfinite(model.loss(case.batch()))


def test_fisher_is_the_sum_of_squared_gradients_of_single_samples(checkpoints, pictures):
    case = Case(Checkpoint(checkpoints["t5"], "t5"), "lst", pictures)
    backbone, model = case.backbone, case.loaded
    chain = list(case.chains[2])
    gold = backbone.with_decoder(case.inputs, [[backbone.start_id, *chain[:-1]]] * 6)
    batches = []
    for i in range(3):
        batch = gold.take(torch.tensor([i]).numpy()).batch()
        batch.targets = {"label": torch.tensor([2])}
        batches.append(batch)
    found = fisher(backbone, model, case.objective, batches)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    model.requires_grad_(True)
    for batch in batches:
        model.zero_grad()
        model(input_ids=batch.columns["encoder.ids"][None], labels=torch.tensor([chain])).loss.backward()
        for n, p in model.named_parameters():
            expected[n] += p.grad**2
    for n, tensor in expected.items():
        torch.testing.assert_close(found[n], tensor, rtol=1e-3, atol=1e-9, msg=n)
    by_fisher = pruned(backbone, model, found, R, aligned=False)
    by_size = pruned(backbone, model, magnitude(model), R, aligned=False)
    assert {k: v.shape for k, v in by_fisher.items()} == {k: v.shape for k, v in by_size.items()}
    assert any(not torch.equal(v, by_size[k]) for k, v in by_fisher.items())


def test_what_cannot_be_is_refused(checkpoints, pictures):
    with pytest.raises(UserError, match="init: one of random, magnitude, fisher"):
        tuner_config("lst", {"init": "fischer"})
    backbone, _ = loaded(checkpoints, "bert")
    config = tuner_config("lst", {"init": "fisher"})
    with pytest.raises(UserError, match="without a head; use --init magnitude"):
        fitting_tuner("lst", config, backbone)
