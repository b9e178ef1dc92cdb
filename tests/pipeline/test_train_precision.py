"""Training in half precision: every kind of target, losses in full width."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from pipeline.extract.batch import Batch
from pipeline.train.features import Feature
from pipeline.train.objectives.regression import NumberHead
from tests import tiny
from tests.pipeline.test_errors import run


@pytest.mark.parametrize("tuner", ["probe", "sherl"])
def test_a_table_of_numbers_trains_in_bfloat16(checkpoints, tmp_path, tuner):
    table = tmp_path / "numbers.csv"
    table.write_text("words,score\n" + "".join(f"{t},{i / 7:.3f}\n" for i, t in enumerate(tiny.sentences(40))))
    common = ["--model", checkpoints["bert"], "--task", table, "--text", "words", "--label", "score",
              "--store", tmp_path / "store"]  # fmt: skip
    assert run("extract", *common, "--for", tuner).exit_code == 0
    small = [] if tuner == "probe" else ["--reduction", 4]
    options = ["--tuner", tuner, *small, "--epochs", 1, "--batch-size", 8]
    losses = {}
    for precision in ("bfloat16", "float32"):
        how = ["--train-precision", precision, "--out", tmp_path / precision]
        result = run("train", *common, *options, *how)
        assert result.exit_code == 0, result.output
        log = map(json.loads, (tmp_path / precision / "log.jsonl").read_text().splitlines())
        losses[precision] = [line["loss"] for line in log if "loss" in line]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert losses["bfloat16"] != losses["float32"]


def test_values_are_not_rounded_to_the_precision_of_the_products():
    """4.01 is no bfloat16: a loss in half precision would learn towards 4.0."""
    head = NumberHead({"a": Feature(8)}, 1, "mean")
    torch.nn.init.zeros_(head.linear.weight)
    batch = Batch({}, {}, {"encoder": np.ones(2, np.int64)}, targets={"label": torch.full((2,), 4.01)})
    with torch.autocast("cpu", torch.bfloat16):
        loss = head.losses({"a": torch.randn(2, 8)}, batch)["number"]
    assert float(loss.detach()) == pytest.approx(4.01**2, rel=1e-6)
    loss.backward()
    assert head.linear.bias.grad is not None
