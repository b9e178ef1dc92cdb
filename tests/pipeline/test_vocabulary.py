"""The softmax of a T5 runs over the tokens of its tokenizer, and a head of its own stays its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.commands.prepare import load_backbone
from pipeline.extract.pretrained import checkpoint_for
from pipeline.store import Store, UserError
from tests import tiny
from tests.pipeline.test_errors import run
from tests.pipeline.test_parity import losses

SPARE = 28  # rows of a table that no token names, as T5's have


def spared(folder: Path, source: Path) -> Path:
    """The checkpoint `source` with rows after its last token that would win every softmax."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    raw = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "vocab_size": raw["vocab_size"] + SPARE}))
    tensors = load_file(source / "model.safetensors")
    for name in tensors.keys() & {"shared.weight", "lm_head.weight"}:
        tensors[name] = torch.cat([tensors[name], 50 * torch.randn(SPARE, tensors[name].shape[1])])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def loaded(folder: Path):
    return load_backbone(checkpoint_for(str(folder)), "float32", "sdpa", torch.device("cpu"))


@pytest.fixture(scope="module", params=["tied", "untied"])
def pair(request, tmp_path_factory):
    """A checkpoint whose tables have a row for each token, and the same with spare rows."""
    base = tmp_path_factory.mktemp(request.param)
    plain = tiny.t5(base / "plain", layers=2, tied=request.param == "tied", gated=request.param == "untied")
    return plain, spared(base / "spared", plain)


def test_rows_that_no_token_names_take_no_part_in_the_loss(pair, table, tmp_path):
    found, stored = [], []
    for folder in pair:
        out = tmp_path / folder.name
        options = ["--model", folder, "--task", table, "--store", out / "store", "--format", "float32"]
        columns = ["--text", "first", "--text-pair", "second", "--label", "label", "--limit", 32]
        assert run("extract", *options, *columns, "--for", "lst").exit_code == 0
        for name, live in (("stored", []), ("live", ["--live"])):
            train = ["--tuner", "lst", "--reduction", 4, "--max-steps", 2, "--batch-size", 8, "--out", out / name]
            result = run("train", *options, *train, *live)
            assert result.exit_code == 0, result.output
            found.append(losses(out / name))
        store = Store.open(out / "store")
        tail = store.load_tensors(checkpoint_for(str(folder)).weights_digest, "tail.safetensors")
        stored.append(len(tail["shared.weight"]))
    assert stored == [checkpoint_for(str(pair[0])).tokens] * 2
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


def test_cut_tables_stay_tied_or_apart(pair):
    plain, spare = (loaded(folder).model for folder in pair)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(spare.state_dict()[name], weight, rtol=0, atol=0)
    assert (spare.lm_head.weight is spare.shared.weight) == (plain.lm_head.weight is plain.shared.weight)
    assert spare.encoder.embed_tokens.weight is spare.shared.weight is spare.decoder.embed_tokens.weight


def test_a_head_of_its_own_is_used_wherever_logits_are_made(tmp_path):
    folder = tiny.t5(tmp_path / "v11", layers=2, tied=False, gated=True)
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    live = loaded(folder)
    backbone, rows = live.backbone, torch.randn(5, 32)
    tail = backbone.tail(backbone.tail_weights(live.model), "sdpa")
    for found in (backbone.logits(live.model, rows), tail.logits(rows)):
        torch.testing.assert_close(found, rows @ head.t())
    assert backbone.tail(None, "sdpa").lm_head is not None, "counted without weights, it has its head as well"


def test_a_head_that_the_weights_lack_is_no_embedding(tmp_path):
    folder = tiny.t5(tmp_path / "headless", layers=2, tied=False, gated=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"tie_word_embeddings: false.*no lm_head\.weight"):
        _ = loaded(folder).model
