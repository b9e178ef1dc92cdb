"""Every tuner on every family it works on goes through the same suite; a new one does by being registered."""

from __future__ import annotations

import pytest
import torch

from pipeline.extract.pretrained import Checkpoint
from pipeline.store import UserError
from pipeline.testing import BACKBONE_CHECKS
from pipeline.train.tuners import base, tuner_class, tuner_names
from tests.pairs import SUITE, pairs
from tests.train.conformance import CHECKS, Case
from tests.train.formulas import FORMULAS


@pytest.fixture(scope="module")
def cases(checkpoints, pictures):
    made: dict[tuple[str, str], Case] = {}

    def get(backbone: str, tuner: str) -> Case:
        if (backbone, tuner) not in made:
            made[backbone, tuner] = Case(Checkpoint(checkpoints[backbone], backbone), tuner, pictures)
        return made[backbone, tuner]

    return get


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize(("backbone", "tuner"), pairs(SUITE))
def test_pair(cases, backbone, tuner, check):
    check(cases(backbone, tuner))


@pytest.mark.parametrize("check", BACKBONE_CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("backbone", SUITE)
def test_backbone(cases, backbone, check):
    with torch.no_grad():
        check(cases(backbone, "probe"))


def test_a_new_tuner_is_one_file_and_one_registering_call(cases, monkeypatch):
    monkeypatch.setattr(base, "_TUNERS", dict(base._TUNERS))
    from tests.train import toy_tuner  # the one file; importing it registers the tuner

    monkeypatch.setitem(base._TUNERS, "toy", toy_tuner.Toy)
    new = [p for p in pairs(SUITE) if p[1] == "toy"]
    sequences = ["t5", "bert", "roberta", "clip_text", "decoder", "vit", "clip"]
    assert [backbone for backbone, _ in new] == sequences
    for backbone, tuner in new:
        for check in CHECKS:
            check(cases(backbone, tuner))


def test_the_toy_is_gone():
    assert "toy" not in tuner_names()


def test_a_tuner_without_a_form_for_a_family_says_so(checkpoints):
    backbone = Checkpoint(checkpoints["cifar"], "cifar").backbone
    with pytest.raises(
        UserError, match=r"'lst' has no form for resnet backbones.*sherl, unipt, fixed, head2toe, probe"
    ):
        tuner_class("lst", backbone)


def test_every_tuner_has_a_formula_for_each_shape_it_works_on():
    assert {(tuner, SUITE[backbone].shape) for backbone, tuner in pairs(SUITE)} == set(FORMULAS)
