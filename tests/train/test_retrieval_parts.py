"""Parts of retrieval by their formulas: ranks, losses and their negatives, GPO, cells, pooled taps, published
counts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, CLIPTextConfig, CLIPVisionConfig, TimmWrapperConfig

from pipeline.extract.backbones import backbone_for
from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.pyramid import pooled_maps
from pipeline.extract.backbones.videos import frames_in, spread
from pipeline.extract.batch import Layout
from pipeline.train.features import Feature, Want
from pipeline.train.objective_configs import ContrastiveConfig, HingeConfig
from pipeline.train.objectives.contrastive import ContrastiveHead, symmetric
from pipeline.train.objectives.gpo import Gpo
from pipeline.train.objectives.hinge import HingeHead, hinge
from pipeline.train.objectives.ranking import directions, folded, ranks, scores
from pipeline.train.objectives.retrieval import dropped
from pipeline.train.tuners import tuner_class, tuner_config

PAIRS = np.array([[0, 0], [0, 1], [1, 2], [2, 3], [1, 3]])  # text 3 is of images 2 and 1


def test_ranks_by_counting() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 5, generator=g), torch.randn(4, 5, generator=g)
    similar = a @ b.t()
    for query in range(3):
        own = [j for i, j in PAIRS.tolist() if i == query]
        best = max(float(similar[query, j]) for j in own)
        want = sum(float(similar[query, j]) >= best for j in range(4) if j not in own)
        assert ranks(a, b, PAIRS)[query] == want
    back = ranks(b, a, PAIRS[:, ::-1])
    assert back[3] == sum(float(similar[0, 3]) >= float(similar[i, 3].max()) for i in (0,) if similar[0, 3] >= max(
        similar[1, 3], similar[2, 3]))  # fmt: skip


def test_embeddings_that_are_all_alike_find_nothing() -> None:
    pairs = np.stack([np.arange(20), np.arange(20)], 1)
    found = scores([torch.ones(20, 4)] * 2, pairs, ("i2t", "t2i"))
    assert found["rsum"] == 0 and found["i2t_median"] == 20
    perfect = scores([torch.eye(20)] * 2, pairs, ("i2t", "t2i"))
    assert perfect["rsum"] == 600 and perfect["t2i_median"] == 1


def test_folds_are_means_over_parts_in_order() -> None:
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(6, 4, generator=g), torch.randn(12, 4, generator=g)
    pairs = np.stack([np.arange(12) // 2, np.arange(12)], 1)
    parts = [scores([a[i : i + 3], b[2 * i : 2 * i + 6]], pairs[:6], ("i2t", "t2i")) for i in (0, 3)]
    found = folded([a, b], pairs, ("i2t", "t2i"), 2)
    assert found["fold_rsum"] == pytest.approx((parts[0]["rsum"] + parts[1]["rsum"]) / 2)


def test_directions_are_told_apart() -> None:
    assert directions(("image", "text")) == ("i2t", "t2i") and directions(("video", "text")) == ("v2t", "t2v")
    assert directions(("first", "final")) == ("first_to_final", "final_to_first")


def test_captions_of_one_image_are_no_negatives() -> None:
    similar = torch.tensor([[0.5, 0.9, 0.1], [0.4, 0.5, 0.2], [0.3, 0.6, 0.5]])
    alike = torch.eye(3, dtype=torch.bool)
    shared = alike.clone()
    shared[0, 1] = shared[1, 0] = True
    every, left = hinge(similar, alike, 0.2, False), hinge(similar, shared, 0.2, False)
    assert every - left == pytest.approx(2 * 0.6 + 2 * 0.1, abs=1e-6)  # both directions of both entries
    assert hinge(similar, alike, 0.2, True) == pytest.approx((0.6 + 0.1 + 0.3) + (0.1 + 0.6 + 0.0), abs=1e-6)
    scale = torch.tensor(math.log(10.0))
    logits = (10 * similar).masked_fill(shared & ~alike, -math.inf)
    own = torch.arange(3)
    want = (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2
    assert symmetric(similar, shared, scale) == pytest.approx(float(want), abs=1e-6)
    most = torch.tensor(100.0, requires_grad=True)
    assert torch.isfinite(symmetric(similar, shared, most))  # clamped at log 100


def test_the_hinge_follows_epochs() -> None:
    head = HingeHead({"image/x": Feature(4), "text/x": Feature(3)}, HingeConfig(negatives="hardest", joint_width=2))
    told = []
    for step in range(9):
        head.begin_step(step, 9, 3)
        told.append((head.hardest, round(head.share, 3)))
    assert told == [(False, 1.0)] * 3 + [(True, 0.0), (True, 0.333), (True, 0.667)] + [(True, 1.0)] * 3
    few, many = (HingeConfig().settled((), [None] * n).negatives for n in (100, 20_000))
    assert (few, many) == ("all", "hardest")
    assert HingeConfig(negatives="hardest").settled((), [None]).negatives == "hardest"


def test_a_frozen_scale_is_no_parameter() -> None:
    features = {"image/x": Feature(4), "text/x": Feature(3)}
    learned = ContrastiveHead(features, ContrastiveConfig(joint_width=2))
    frozen = ContrastiveHead(features, ContrastiveConfig(joint_width=2, learn_scale=False, logit_scale=100))
    assert {n for n, _ in learned.named_parameters()} - {n for n, _ in frozen.named_parameters()} == {"log_scale"}
    assert float(frozen.log_scale.exp()) == pytest.approx(100) and "log_scale" not in frozen.state_dict()


def test_gpo_at_its_ends() -> None:
    """Equal weights are the mean, the first place alone is the maximum; lengths do not mix."""
    gpo, layout = Gpo(), Layout.of(np.array([3, 1, 5]))
    rows = torch.randn(9, 6, generator=torch.Generator().manual_seed(2))
    weights = gpo.weights(np.array([3, 1, 5]), rows.device)
    assert torch.allclose(weights.sum(1), torch.ones(3)) and weights[1].tolist() == [1, 0, 0, 0, 0]
    nn.init.zeros_(gpo.linear.weight)
    assert torch.allclose(gpo(rows, layout), layout.mean(rows), atol=1e-6)
    alone = gpo(rows[4:], Layout.of(np.array([5])))
    assert torch.allclose(gpo(rows, layout)[2:], alone, atol=1e-6)


def test_dropped_cells_leave_one_at_least() -> None:
    torch.manual_seed(0)
    rows, layout = torch.arange(40.0)[:, None], Layout.of(np.array([1, 38, 1]))
    left, cut = dropped(rows, layout, 0.9)
    assert len(left) == int(cut.lengths.sum()) < 20 and cut.lengths.tolist()[::2] == [1, 1]
    assert left[0] == 0 and left[-1] == 39


def test_pooled_taps_are_torchs_pooling() -> None:
    maps = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(3))
    rows = maps.flatten(2).transpose(1, 2)
    want = (F.max_pool2d(maps, 4) + F.avg_pool2d(maps, 4)).flatten(2).transpose(1, 2)
    assert torch.allclose(pooled_maps(rows, (8, 8), (2, 2)), want, atol=1e-6)
    assert pooled_maps(rows, (8, 8), (8, 8)).equal(2 * rows)  # a tap that is there already is doubled


def counted(name: str, backbone: Backbone, joint: int) -> int:
    with torch.device("meta"):
        made = tuner_class(name, backbone)(
            tuner_config(name, {}), backbone, backbone.tail(None, "sdpa"), Want(joint=joint)
        )
    return sum(p.numel() for p in made.parameters())


def test_published_counts_of_clip4clip() -> None:
    """ViT-B/32: 9.6 M in both papers."""
    vision = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=32,
        projection_dim=512, architectures=["CLIPVisionModelWithProjection"],
    )  # fmt: skip
    text = CLIPTextConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, projection_dim=512,
        architectures=["CLIPTextModelWithProjection"],
    )  # fmt: skip
    for name, count in (("sherl-clip", 9_597_980), ("unipt-clip", 9_584_642)):
        assert sum(counted(name, backbone_for(config), 512) for config in (vision, text)) == count


def test_published_counts_of_vse() -> None:
    """BERT-base and ResNeXt-101 32×8: SHERL 5.133 M and 3.027 M, heads 2.886 M, GPO; 11.07 M, where the paper prints
    11.3: the difference is not explained by any part of the released code."""
    bert, resnext = backbone_for(BertConfig()), backbone_for(TimmWrapperConfig(architecture="resnext101_32x8d"))
    text, image = counted("sherl-vse", bert, 1024), counted("sherl-vse", resnext, 1024)
    features = {"image/a": Feature(2048, "image/stage4", "map"), "text/a": Feature(768, "text/encoder", "sequence")}
    head = HingeHead(features, HingeConfig(pooling="gpo"))
    total = text + image + sum(p.numel() for p in head.parameters())
    assert (text, image) == (5_133_058, 3_027_458)
    assert sum(p.numel() for p in head.maps.parameters()) == 2_885_632
    assert total == 11_071_556 and sum(p.numel() for p in Gpo().parameters()) == 12_704


def test_frames_are_spread_evenly(tmp_path: Path) -> None:
    assert spread(5, 12).tolist() == [0, 1, 2, 3, 4] and spread(100, 12)[[0, -1]].tolist() == [0, 99]
    assert len(set(spread(13, 12).tolist())) == 12
    for name in ("f10.png", "f2.png", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in frames_in(tmp_path)] == ["f2.png", "f10.png"]
