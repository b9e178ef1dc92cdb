"""Families: states are those of the Hugging Face model, the tail continues them exactly, padding changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.extract.backbones import TextOptions
from pipeline.extract.backbones.text import decision_trie, gold_chain
from pipeline.extract.kernels.t5_attention import is_cheaper
from pipeline.extract.pretrained import Checkpoint
from tests import tiny

PROMPTS = {"t5": "task first: {0} second: {1}", "bert": "", "roberta": "", "clip_text": "", "decoder": ""}
TARGETS = ["0", "1", "2 3"]


@pytest.fixture(params=tiny.CHECKPOINTS)
def loaded(request, checkpoints):
    checkpoint = Checkpoint(checkpoints[request.param], request.param)
    model = checkpoint.backbone.load(checkpoint.folder, torch.float32, "sdpa", "cpu")
    return checkpoint, checkpoint.backbone, model


def inputs_of(checkpoint, n=6, gold=True):
    backbone = checkpoint.backbone
    texts = list(zip(tiny.sentences(n), tiny.sentences(n, 1, 5), strict=True))
    answers = ()
    if backbone.writes_text:
        candidates = backbone.candidates(checkpoint.tokenizer, TARGETS)
        answers = (candidates, [i % 3 for i in range(n)] if gold else None)
    return backbone.prepare(checkpoint.tokenizer, texts, TextOptions(PROMPTS[checkpoint.name], 128), *answers)


@torch.no_grad()
def reference(backbone, model, batch):
    """Hidden states of a plain forward pass of the Hugging Face model, name → packed rows (embedding as `.emb`)."""
    encoder = batch.layout("encoder")
    kwargs = {
        "input_ids": encoder.pad(batch.columns["encoder.ids"], backbone.config.pad_token_id),
        "attention_mask": encoder.mask.long(),
        "output_hidden_states": True,
    }
    if "encoder.types" in batch.columns:
        kwargs["token_type_ids"] = encoder.pad(batch.columns["encoder.types"])
    if backbone.name == "t5":
        decoder = batch.layout("decoder")
        out = model(**kwargs, decoder_input_ids=decoder.pad(batch.columns["decoder.ids"]))
        streams = {"encoder": (encoder, out.encoder_hidden_states), "decoder": (decoder, out.decoder_hidden_states)}
        logits = decoder.unpad(out.logits)
    else:
        streams, logits = {"encoder": (encoder, model(**kwargs).hidden_states)}, None
    found = {f"{s}.emb": layout.unpad(h[0]) for s, (layout, h) in streams.items()}
    for stream, (layout, hidden) in streams.items():
        # T5's last entry is after the final norm; a state is the block's own output.
        last = len(hidden) - 1 if backbone.name == "t5" else len(hidden)
        found |= {f"{stream}.{i - 1}": layout.unpad(hidden[i]) for i in range(1, last)}
    return found, logits


def test_states_and_embeddings_are_those_of_the_model(loaded):
    checkpoint, backbone, model = loaded
    batch = inputs_of(checkpoint).batch()
    states = backbone.run(model, batch, backbone.states())
    assert list(states) != [] and set(states) == set(backbone.states())
    expected, _ = reference(backbone, model, batch)
    tail = backbone.tail(backbone.tail_weights(model), "sdpa").eval()
    for stream in backbone.streams:
        torch.testing.assert_close(tail.embed(batch, stream), expected.pop(f"{stream}.emb"), rtol=0, atol=0)
    for name, rows in expected.items():
        torch.testing.assert_close(states[name], rows, rtol=0, atol=0)


def test_only_wanted_states_are_collected(loaded):
    checkpoint, backbone, model = loaded
    batch = inputs_of(checkpoint).batch()
    assert list(backbone.run(model, batch, ["encoder.1"])) == ["encoder.1"]


def test_the_tail_continues_the_states_exactly(loaded):
    checkpoint, backbone, model = loaded
    batch = inputs_of(checkpoint).batch()
    states = backbone.run(model, batch, backbone.states())
    _, logits = reference(backbone, model, batch)
    tail = backbone.tail(backbone.tail_weights(model), "sdpa").eval()
    last = backbone.streams[-1]
    hidden = {last: states[f"{last}.{backbone.depth(last) - 2}"]}
    if backbone.name == "t5":
        hidden["encoder"] = tail.final_norm(states[f"encoder.{backbone.depth('encoder') - 1}"], "encoder")
    rows = tail(hidden, batch)
    torch.testing.assert_close(rows, states[f"{last}.{backbone.depth(last) - 1}"], rtol=0, atol=0)
    if logits is not None:
        found = tail.logits(tail.final_norm(rows, "decoder"))
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-6)
        some = torch.tensor([3, 7])
        found = tail.logits(tail.final_norm(rows, "decoder"), some)
        torch.testing.assert_close(found, logits[:, some], rtol=0, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_untied_heads_of_t5(tmp_path, gated):
    checkpoint = Checkpoint(tiny.t5(tmp_path, tied=False, gated=gated), "t5")
    backbone = checkpoint.backbone
    model = backbone.load(checkpoint.folder, torch.float32, "sdpa", "cpu")
    weights = backbone.tail_weights(model)
    assert "lm_head.weight" in weights and not torch.equal(weights["lm_head.weight"], weights["shared.weight"])
    batch = inputs_of(checkpoint).batch()
    states = backbone.run(model, batch, backbone.states())
    tail = backbone.tail(weights, "sdpa").eval()
    rows = tail({"encoder": tail.final_norm(states["encoder.3"], "encoder"), "decoder": states["decoder.2"]}, batch)
    _, logits = reference(backbone, model, batch)
    torch.testing.assert_close(tail.logits(tail.final_norm(rows, "decoder")), logits, rtol=0, atol=1e-6)
    assert tail.scale == 1.0  # v1.1 does not scale what enters the head


def test_padding_a_batch_differently_changes_nothing(loaded):
    checkpoint, backbone, model = loaded
    inputs = inputs_of(checkpoint)
    together = backbone.run(model, inputs.batch(), backbone.states())
    for i in range(len(inputs)):
        alone = inputs.take(np.array([i]))
        for name, rows in backbone.run(model, alone.batch(), backbone.states()).items():
            stream = name.split(".")[0]
            start = int(inputs.lengths[stream][:i].sum())
            torch.testing.assert_close(rows, together[name][start : start + len(rows)], rtol=1e-5, atol=1e-5)


def test_keys_depend_on_inputs_and_nothing_else(loaded):
    checkpoint, backbone, _ = loaded
    inputs = inputs_of(checkpoint)
    keys = inputs.keys()
    assert len(set(keys)) == len(keys)
    order = np.array([3, 0, 5])
    assert inputs.take(order).keys() == [keys[i] for i in order]
    assert inputs_of(checkpoint, gold=False).keys() == keys or backbone.name == "t5"
    if backbone.name == "t5":  # the decoder's input is part of what the states depend on
        assert not set(inputs_of(checkpoint, gold=False).keys()) & set(keys)


def test_a_trie_holds_the_states_of_each_of_its_chains(checkpoints):
    checkpoint = Checkpoint(checkpoints["t5"], "t5")
    backbone = checkpoint.backbone
    model = backbone.load(checkpoint.folder, torch.float32, "sdpa", "cpu")
    inputs = inputs_of(checkpoint, 1)
    targets = [[5, 6, 1], [5, 7, 9, 1], [5, 7, 8, 1], [11, 1]]
    ids, parents = decision_trie(targets, 0)
    assert (ids, parents) == ([0, 5, 7], [-1, 0, 1])
    tree = backbone.with_decoder(inputs, [ids])
    tree.columns["decoder.parent"] = np.asarray(parents, np.int32)
    found = backbone.run(model, tree.batch(), ["decoder.3"])["decoder.3"]
    chain, _ = gold_chain(targets[1], 0)
    plain = backbone.run(model, backbone.with_decoder(inputs, [chain]).batch(), ["decoder.3"])["decoder.3"]
    torch.testing.assert_close(found, plain[:3], rtol=1e-5, atol=1e-6)


def test_branches_of_a_trie_do_not_see_each_other(checkpoints):
    checkpoint = Checkpoint(checkpoints["t5"], "t5")
    backbone = checkpoint.backbone
    model = backbone.load(checkpoint.folder, torch.float32, "sdpa", "cpu")
    inputs = inputs_of(checkpoint, 1)
    tree = backbone.with_decoder(inputs, [[0, 5, 6, 7]])
    tree.columns["decoder.parent"] = np.asarray([-1, 0, 0, 2], np.int32)  # 0 → 5 and 0 → 6 → 7
    found = backbone.run(model, tree.batch(), ["decoder.2"])["decoder.2"]
    one = backbone.run(model, backbone.with_decoder(inputs, [[0, 5]]).batch(), ["decoder.2"])["decoder.2"]
    two = backbone.run(model, backbone.with_decoder(inputs, [[0, 6, 7]]).batch(), ["decoder.2"])["decoder.2"]
    torch.testing.assert_close(found[:2], one, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[2:], two[1:], rtol=1e-5, atol=1e-6)


def test_cut_texts_are_counted(loaded):
    checkpoint, backbone, _ = loaded
    texts = [("the cat " * 30, "a"), ("the", "a")]
    options = TextOptions(PROMPTS[checkpoint.name], 20)
    answers = ([[5, 1], [6, 1]], None) if backbone.writes_text else ()
    inputs = backbone.prepare(checkpoint.tokenizer, texts, options, *answers)
    assert inputs.truncated.tolist() == [True, False]
    assert inputs.lengths["encoder"].max() == 20


def test_a_training_tail_attends_as_the_block_does(loaded):
    """T5 trains with the maps on the side of the queries: the same rows and gradients to rounding."""
    checkpoint, backbone, model = loaded
    if backbone.name != "t5":
        pytest.skip("T5 alone has cross-attention")
    batch = inputs_of(checkpoint, gold=False).batch()  # one or a few positions, as for class labels
    assert is_cheaper(model.decoder.block[0].layer[1], batch.layout("decoder").mask.shape[1])
    states = backbone.run(model, batch, ["encoder.3", "decoder.2"])
    found = []
    for training in (False, True):
        tail = backbone.tail(backbone.tail_weights(model), "sdpa").train(training)
        for module in tail.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        tail.block.layer[0].SelfAttention.dropout = tail.block.layer[1].EncDecAttention.dropout = 0.0
        hidden = {"encoder": states["encoder.3"], "decoder": states["decoder.2"]}
        hidden = {k: v.clone().requires_grad_() for k, v in hidden.items()}
        rows = tail(hidden, batch)
        rows.square().mean().backward()
        found.append((rows, hidden["encoder"].grad, hidden["decoder"].grad))
    for plain, moved in zip(*found, strict=True):
        torch.testing.assert_close(moved, plain, rtol=1e-4, atol=1e-6)
