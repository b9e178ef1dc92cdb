"""Tuners that work on parts of like length: the loss and the gradients are those of the whole grid."""

from __future__ import annotations

import pytest
import torch

from pipeline.extract.kernels import bylength, dropout
from pipeline.extract.pretrained import Checkpoint
from tests.train.conformance import Case


@pytest.mark.parametrize(("tuner", "backbone"), [("lst", "bert"), ("lst", "t5"), ("sherl", "bert"), ("sherl", "vit")])
def test_parts_change_no_gradient(checkpoints, pictures, monkeypatch, tuner: str, backbone: str) -> None:
    monkeypatch.setattr(dropout, "drop", lambda x, p, training: x)
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, *_: x)
    monkeypatch.setattr(bylength, "SAMPLES", 2)
    case = Case(Checkpoint(checkpoints[backbone], backbone), tuner, pictures)
    found, cut = [], []
    of = bylength.Parts.of
    monkeypatch.setattr(bylength.Parts, "of", lambda *a: cut.append(of(*a)) or cut[-1])
    for most in (1, 3):
        monkeypatch.setattr(bylength, "PARTS", most)
        model, batch = case.model().train(), case.batch()
        batch._derived = {}
        batch.targets = {"label": torch.arange(len(batch)) % 3}
        model.loss(batch).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    whole, parts = found
    assert whole.keys() == parts.keys() and whole
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert any(p is not None for p in cut) == (backbone != "vit")  # images are of one size
