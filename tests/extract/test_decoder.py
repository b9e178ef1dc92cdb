"""Decoder-only backbones beside the library's own models: states, live last layer, head, embedding, side blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, BambaConfig

from pipeline.extract.backbones import Layout, backbone_for
from pipeline.extract.backbones.decoder import Decoder
from pipeline.extract.batch import Batch
from pipeline.extract.past import Past
from pipeline.store.errors import UserError
from pipeline.train.sideblocks import side_stack
from tests import decoders

LENGTHS = np.array([13, 7, 1])
KINDS = [pytest.param(kind, marks=() if kind in decoders.USUAL else pytest.mark.matrix) for kind in decoders.TYPES]


def a_batch(words: int = 64, lengths: np.ndarray = LENGTHS) -> Batch:
    ids = torch.randint(3, words, (int(lengths.sum()),), generator=torch.Generator().manual_seed(1))
    return Batch({}, {"decoder.ids": ids}, {"decoder": lengths})


def hooked(model, batch: Batch) -> tuple[dict[int, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Outputs of the library's layers, its logits and the embedding output, each sample run by itself, packed."""
    stack = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    states: dict[int, list[torch.Tensor]] = {i: [] for i in range(4)}
    logits, embedding = [], []
    keep = [
        layer.register_forward_hook(lambda _m, _a, out, i=i: states[i].append(out[0])) for i, layer in enumerate(stack)
    ]
    for ids in batch.columns["decoder.ids"].split(batch.lengths["decoder"].tolist()):
        out = model(input_ids=ids[None], use_cache=False, output_hidden_states=True)
        logits.append(out.logits[0])
        embedding.append(out.hidden_states[0][0])
    for handle in keep:
        handle.remove()
    return {i: torch.cat(rows) for i, rows in states.items()}, torch.cat(logits), torch.cat(embedding)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_states_and_the_live_layer_are_the_librarys(kind):
    model, batch = decoders.model(kind), a_batch()
    backbone = backbone_for(model.config)
    wanted, logits, embedding = hooked(model, batch)
    found = backbone.run(model, batch, backbone.states())
    assert list(found) == [f"decoder.{i}" for i in range(4)]
    for i in range(4):
        largest = float(wanted[i].abs().max())
        torch.testing.assert_close(found[f"decoder.{i}"], wanted[i], rtol=1e-5, atol=1e-5 * max(1.0, largest))
    tail = backbone.tail(backbone.tail_weights(model), backbone.attentions[0]).eval()
    live = tail({"decoder": found["decoder.2"]}, batch)
    torch.testing.assert_close(live, found["decoder.3"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tail.logits(tail.final_norm(live, "decoder")), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tail.embed(batch), embedding, rtol=1e-5, atol=1e-5)
    some = torch.tensor([5, 9])
    normed = backbone.finish(model, found["decoder.3"])
    torch.testing.assert_close(backbone.logits(model, normed, some), logits[:, some], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_last_state_is_before_the_final_norm():
    model, batch = decoders.model("llama"), a_batch(lengths=np.array([9]))
    backbone = backbone_for(model.config)
    last = backbone.run(model, batch, ["decoder.3"])["decoder.3"]
    behind = model(input_ids=batch.columns["decoder.ids"][None], output_hidden_states=True).hidden_states[-1][0]
    assert (last - behind).abs().max() > 0.1
    torch.testing.assert_close(backbone.finish(model, last), behind, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_side_blocks_are_causal_and_a_cache_changes_nothing(kind):
    torch.manual_seed(0)
    backbone = backbone_for(decoders.config(kind))
    side = side_stack(backbone, "decoder", [0, 1, 3], 4).eval()
    lengths = np.array([12, 12])
    batch, grid = a_batch(lengths=lengths), torch.randn(2, 12, 8)

    def run(batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        context = side.context(batch, "decoder", None)
        for k in range(3):
            hidden = side.block(k, hidden, context)
        return side.final(hidden)

    whole = run(batch, grid)
    assert whole.shape == grid.shape and torch.isfinite(whole).all()
    later = grid.clone()
    later[:, 8:] = torch.randn(2, 4, 8)
    torch.testing.assert_close(run(batch, later)[:, :8], whole[:, :8], rtol=1e-4, atol=1e-5)
    assert (run(batch, later)[:, 8:] - whole[:, 8:]).abs().max() > 1e-3
    past, pieces = Past(), []
    for first, end in ((0, 5), (5, 6), (6, 9), (9, 12)):
        part = Batch({}, {}, {"decoder": np.full(2, end - first)}, past=past)
        part.columns["decoder.ids"] = torch.zeros(2 * (end - first), dtype=torch.long)
        pieces.append(run(part, grid[:, first:end]))
        past.length = end
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


def test_side_heads_stay_as_many_while_their_width_is_even():
    backbone = backbone_for(decoders.config("llama"))
    assert side_stack(backbone, "decoder", [0], 4).shell.config.num_attention_heads == 4  # of width 2
    narrower = side_stack(backbone, "decoder", [0], 8).shell.config
    assert (narrower.num_attention_heads, narrower.num_key_value_heads, narrower.head_dim) == (2, 1, 2)
    with pytest.raises(UserError, match="no head of even width"):
        side_stack(backbone, "decoder", [0], 32)


@pytest.mark.parametrize("kind", [k for k in decoders.TYPES if decoders.EXPERTS.items() <= decoders.TYPES[k].items()])
def test_experts_of_a_narrow_side_network_learn(kind):
    """Grouped products of experts want rows of 16 bytes at least; at a width of 2 they are not used."""
    side = side_stack(backbone_for(decoders.config(kind)), "decoder", [0], 16)
    context = side.context(a_batch(lengths=np.array([5])), "decoder", None)
    side.block(0, torch.randn(1, 5, 2), context).square().sum().backward()
    experts = [p for name, p in side.named_parameters() if "expert" in name]
    assert experts and any(p.grad is not None and p.grad.abs().sum() > 0 for p in experts)


@torch.no_grad()
def test_a_sample_does_not_see_its_neighbours_and_padding_is_by_length():
    """Its own ids may hold the padding id (GPT-2's end token is one), which is a token like any other."""
    model = decoders.model("mistral")
    backbone = backbone_for(model.config)
    batch = a_batch()
    batch.columns["decoder.ids"][-4:] = model.config.pad_token_id
    together = backbone.run(model, batch, ["decoder.3"])["decoder.3"]
    layout = Layout.of(LENGTHS)
    for i, rows in enumerate(together.split(LENGTHS.tolist())):
        ids = batch.columns["decoder.ids"][layout.sample == i]
        alone = Batch({}, {"decoder.ids": ids}, {"decoder": LENGTHS[i : i + 1]})
        torch.testing.assert_close(backbone.run(model, alone, ["decoder.3"])["decoder.3"], rows, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_run_alone_is_refused_by_name():
    with pytest.raises(UserError, match="bamba"):
        backbone_for(BambaConfig())
    mixed = AutoConfig.for_model("qwen3", num_hidden_layers=2, layer_types=["full_attention", "linear_attention"])
    with pytest.raises(UserError, match=r"qwen3.*linear_attention"):
        backbone_for(mixed)
    with pytest.raises(UserError, match=r"gpt2.*scale_attn_by_inverse_layer_idx"):
        backbone_for(AutoConfig.for_model("gpt2", scale_attn_by_inverse_layer_idx=True))


def test_what_is_usual_follows_the_checkpoint():
    plain, half = decoders.config("llama"), decoders.config("llama")
    half.dtype = torch.bfloat16
    assert backbone_for(plain).usual_precision == "float32" and backbone_for(half).usual_precision == "bfloat16"
    assert backbone_for(plain).usual_length == 160
    assert backbone_for(plain).attentions == ("sdpa", "eager")
    assert backbone_for(decoders.config("gemma2")).attentions == ("eager",)  # sdpa would leave out the soft cap


def test_every_type_is_compared():
    assert set(decoders.TYPES) == set(Decoder.model_types)
