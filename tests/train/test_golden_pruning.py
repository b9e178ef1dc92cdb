"""LST's pruned start against the released code: which rows stay, in which order, and the Fisher sums they may be chosen
by. Runs on every pruning file of the folder `GOLDEN` (default: tests/golden), told by its metadata.

| case | what is compared | difference found |
|---|---|---|
| lst-pruning-magnitude | pruned tensors, their rows and columns in the released order | none |
| lst-pruning-fisher | the same from the released sums; our sums in float32 | none; 1.3e-6 of a tensor's largest |
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from pipeline.extract.backbones import Inputs, backbone_for
from pipeline.train.importance import fisher, magnitude
from pipeline.train.objectives import Answers, Objective, ObjectiveConfig
from pipeline.train.objectives.label_text import LabelText
from pipeline.train.sideblocks import pruned

FOLDER = Path(os.environ.get("GOLDEN") or Path(__file__).parents[1] / "golden")
TOLERANCE = 1e-5  # of a tensor's largest value, float32


class File:
    """A golden file: tensors by kind ("backbone", "input", "output") and name, and its metadata."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.about: dict[str, str] = file.metadata() or {}
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.config: dict[str, Any] = json.loads(self.about.get("config", "{}"))

    def of(self, kind: str) -> dict[str, Tensor]:
        return {n.removeprefix(f"{kind}/"): t for n, t in self.tensors.items() if n.startswith(f"{kind}/")}


def about(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


PRUNING = [p for p in sorted(FOLDER.glob("*.safetensors")) if "pruning" in about(p).get("file", "")]


@pytest.fixture(params=PRUNING, ids=lambda p: p.stem)
def golden(request) -> File:
    return File(request.param)


def built(golden: File) -> tuple[Any, Any]:
    """The family and the frozen T5 of the file."""
    c, weights = golden.config, golden.of("backbone")
    config = T5Config(
        vocab_size=c["vocab"],
        d_model=c["width"],
        d_kv=len(weights["encoder.block.0.layer.0.SelfAttention.q.weight"]) // c["heads"],
        d_ff=c["ff"],
        num_heads=c["heads"],
        num_layers=c["layers"],
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    state = model.state_dict()
    unknown = weights.keys() - state.keys()
    tied = {k for k in state if k.endswith("embed_tokens.weight") or k == "lm_head.weight"}
    assert not unknown and state.keys() - weights.keys() <= tied
    model.load_state_dict(weights, strict=False)
    return backbone_for(config), model


def importance(golden: File, model: Any) -> dict[str, Tensor]:
    return golden.of("output/importance") or magnitude(model)


def ours(name: str) -> str:
    """The released name of a pruned tensor as `pruned` has it."""
    return name.replace(".block.", ".").replace("final_layer_norm", "norm")


def test_pruned_tensors_are_the_released_ones_in_their_order(golden):
    backbone, model = built(golden)
    found = pruned(backbone, model, importance(golden, model), golden.config["reduction"], aligned=False)
    released = golden.of("output/released")
    shared = released.pop("shared.weight")  # the side network has no embedding of its own
    assert shared.shape[1] == golden.config["width"] // golden.config["reduction"] and len(released) > 20
    for name, tensor in released.items():
        assert torch.equal(found[ours(name)], tensor), name
    biases = {n for n in found if "relative_attention_bias" in n}
    assert found.keys() - {ours(n) for n in released} == biases


def test_fisher_sums_are_the_released_ones(golden):
    expected = golden.of("output/importance")
    if not expected:
        pytest.skip(f"{golden.about['case']} has no Fisher sums")
    backbone, model = built(golden)
    inputs = golden.of("input")
    found = fisher(backbone, model, *singles(backbone, inputs))
    for name, tensor in expected.items():
        worst = float((found[name] - tensor).abs().max() / tensor.abs().max())
        assert worst <= TOLERANCE, f"{name}: {worst:.1e} of its largest"


def singles(backbone: Any, inputs: dict[str, Tensor]) -> tuple[Objective, list[Any]]:
    """The file's samples one by one, each answer a class of its own."""
    lengths = inputs["attention_mask"].sum(1)
    answers = [tuple(row[row >= 0].tolist()) for row in inputs["labels"]]
    batches = []
    for i, answer in enumerate(answers):
        ids = inputs["input_ids"][i, : lengths[i]].int().numpy()
        sample = Inputs({"encoder": lengths[i : i + 1].numpy()}, {"encoder.ids": ids}, (lengths[i : i + 1] < 0).numpy())
        batch = backbone.with_decoder(sample, [[backbone.start_id, *answer[:-1]]]).batch()
        batch.targets = {"label": torch.tensor([i])}
        batches.append(batch)
    return LabelText(ObjectiveConfig(), Answers.of_classes(len(answers), answers)), batches
