"""Head2Toe: which features stay, and what happens to the others."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pipeline.extract.pretrained import Checkpoint
from pipeline.store import UserError
from pipeline.train.tuners import tuner_class, tuner_config
from tests.train.conformance import Case


def case_of(checkpoints, pictures, backbone: str = "bert", **options) -> Case:
    case = Case(Checkpoint(checkpoints[backbone], backbone), "head2toe", pictures)
    case.config = tuner_config("head2toe", options)
    return case


def test_features_are_pooled_layers_of_unit_norm(checkpoints, pictures):
    case = case_of(checkpoints, pictures, layers=[1, 3])
    model, batch = case.model().eval(), case.batch()
    layout = batch.layout("encoder")
    found = torch.cat([layout.mean(rows) for rows in model(batch).values()], dim=1)
    for k, layer in enumerate((1, 3)):
        grid = layout.pad(batch.states[f"encoder.{layer}"]).sum(1) / layout.lengths[:, None]
        torch.testing.assert_close(found[:, 32 * k : 32 * (k + 1)], F.normalize(grid, dim=1))
    assert model.trainable_parameters() == (64 + 1) * 3


def test_informative_features_are_selected_once_and_saved(checkpoints, pictures):
    case = case_of(checkpoints, pictures, features=2 / 128, lasso=1e-2, select_after=60)
    model, batch = case.model(), case.batch()
    count, layout = len(batch), batch.layout("encoder")
    told = torch.tensor([0, 1, 0, 1, 0, 1])
    batch.targets = {"label": told}
    for name in batch.states:  # a constant feature everywhere; channel 7 of layer 2 tells the label
        batch.states[name] = torch.zeros_like(batch.states[name])
        batch.states[name][:, 0] = 1.0
    batch.states["encoder.2"][:, 7] = (2.0 * told - 1)[layout.sample]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(1, 71):
        optimizer.zero_grad()
        model.train().loss(batch).backward()
        optimizer.step()
        model.stepped()
        assert int(model.tuner.mask.sum()) == (128 if step < 60 else 2)
    assert model.tuner.mask[2 * 32 + 7] == 1
    assert model.eval().predict(batch)["label"].tolist() == told.tolist()
    used = sum(int((rows != 0).any(0).sum()) for rows in model(batch).values())
    assert used <= 2 and int(model.tuner.seen) == 60
    other = case.model(1)
    other.load_trainable(model.trainable_state())
    torch.testing.assert_close(other.eval()(batch), model(batch), rtol=0, atol=0)
    assert len(other.predict(batch)["label"]) == count


def test_the_penalty_is_the_group_lasso_of_training_alone(checkpoints, pictures):
    case = case_of(checkpoints, pictures, lasso=0.5)
    model, batch = case.model(), case.batch()
    plain = float(model.eval().loss(batch).detach())
    groups = model.head.linear.weight.detach().square().sum(0).sqrt().sum()
    model.train()
    model.tuner.tail.eval()
    assert float(model.loss(batch).detach()) == pytest.approx(plain + 0.5 * float(groups), rel=1e-5)
    # Steps count towards the selection, not losses: of these a step has several, or on an idle rank none.
    assert int(model.tuner.seen) == 0
    model.stepped()
    assert int(model.tuner.seen) == 1


def test_every_block_of_a_staged_backbone_is_read_and_bad_options_are_refused(checkpoints):
    backbone = Checkpoint(checkpoints["swin"], "swin").backbone
    states = tuner_class("head2toe", backbone).states(tuner_config("head2toe", {}), backbone)
    assert states == [f"{s}.{i}" for s in backbone.streams for i in range(backbone.depth(s))]
    with pytest.raises(UserError, match="reads every block"):
        tuner_class("head2toe", backbone).states(tuner_config("head2toe", {"layers": [0]}), backbone)
    for options, word in (
        ({"features": 0}, "features"),
        ({"lasso": -1}, "lasso"),
        ({"select_after": 0}, "select_after"),
    ):
        with pytest.raises(UserError, match=word):
            tuner_config("head2toe", options)
