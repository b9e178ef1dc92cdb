"""Methods under dense heads: the counts that E³VA's tables print, its ablations, live baselines on feature pyramids."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from transformers import TimmWrapperConfig

from pipeline.cli.main import main
from pipeline.extract.backbones import backbone_for
from pipeline.extract.pretrained import Checkpoint
from pipeline.extract.projection import Projection, orthogonal
from pipeline.store.errors import UserError
from pipeline.train.baselines.methods import BaselineModel, baseline
from pipeline.train.features import Want
from pipeline.train.necks import SimplePyramid
from pipeline.train.objective_configs import SegmentationConfig
from pipeline.train.objectives import Answers
from pipeline.train.objectives.segmentation import Segmentation
from pipeline.train.tuners import tuner_class, tuner_config
from tests.scenes import write_scenes
from tests.train.conformance import Case

# Yin et al. (2023): Swin-B, Swin-L with windows of 7, without neck and head
PUBLISHED = {
    "bitfit": (201_656, 302_484),
    "norm-tuning": (59_392, 89_088),
    "partial-1": (12_601_632, 28_339_632),
    "adapter": (3_107_328, 4_659_456),
}
# Adapters and the four norms on Swin-L
ABLATIONS = {
    "plain": ({"adapter": "plain"}, 2_353_536),
    "stacked": ({"order": "stacked"}, 1_792_512),
    "mergings": ({"merging": "trained"}, 1_792_512 + 8 * (192**2 + 384**2 + 768**2) + 8 * (192 + 384 + 768)),
    "norms": ({"norms": "frozen"}, 1_792_512 - 2 * 192 * 15),
}
LINEAR = Segmentation(SegmentationConfig(head="linear"), Answers.of_classes(4))


def swin(size: str, window: int = 7):
    side = 224 if window == 7 else 384
    return backbone_for(TimmWrapperConfig(architecture=f"swin_{size}_patch4_window{window}_{side}"))


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_baselines_of_e3va_have_their_published_parameters(name, size):
    backbone = swin(size)
    with torch.device("meta"):
        model = BaselineModel(baseline(name), backbone, copy.deepcopy(backbone.skeleton), LINEAR)
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and n.startswith("tuner.model."))
    assert trained == PUBLISHED[name][size == "large"]


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_of_e3va_have_their_parameters(name):
    options, count = ABLATIONS[name]
    backbone = swin("large", 12)
    with torch.device("meta"):
        made = tuner_class("e3va")(tuner_config("e3va", options), backbone, backbone.tail(None, "sdpa"), Want())
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_start_as_the_head_alone_and_differ_when_trained(checkpoints, pictures, name):
    """Without corrections each is the frozen pyramid behind its norms; with random ones it is E³VA no more."""
    checkpoint, options = Checkpoint(checkpoints["swin"], "swin"), ABLATIONS[name][0]
    alpha = {} if name == "plain" else {"alpha": 2}
    fixed = Case(checkpoint, "fixed", pictures)
    start = fixed.model().tuner(fixed.batch())
    case = Case(checkpoint, "e3va", pictures, {**alpha, **options})
    tuner = case.model().tuner
    for stream, rows in tuner(case.batch()).items():
        torch.testing.assert_close(rows, start[stream], rtol=1e-3, atol=1e-3)
    usual = Case(checkpoint, "e3va", pictures, {"alpha": 2, "zero_init": False})
    other = Case(checkpoint, "e3va", pictures, {"zero_init": False, **alpha, **options})
    models = usual.model().train(), other.model().train()
    trained = [{n for n, p in m.tuner.named_parameters() if p.requires_grad} for m in models]
    if name == "stacked":
        found = [m.tuner(usual.batch()) for m in models]
        assert trained[0] == trained[1] and not any(torch.allclose(found[0][s], found[1][s]) for s in found[0])
    else:
        assert trained[0] != trained[1]
    models[1].loss(other.batch()).backward()
    assert all(p.grad is not None for p in models[1].tuner.parameters() if p.requires_grad)


def test_projected_branches_start_as_the_head_alone(checkpoints, pictures):
    checkpoint = Checkpoint(checkpoints["swin"], "swin")
    fixed, case = Case(checkpoint, "fixed", pictures), Case(checkpoint, "e3va", pictures, {"alpha": 2})
    start, batch = fixed.model().tuner(fixed.batch()), case.batch()
    backbone = checkpoint.backbone.projected(orthogonal(checkpoint.backbone.narrowed(12), 12, 0))
    tuner = tuner_class("e3va")(case.config, backbone, case.tail, Want())
    batch.states = backbone.projection.apply(batch.states)
    assert batch.states["stage3.0.msa"].shape[1] == 12 and batch.states["stage1.0.msa"].shape[1] == 8
    for stream, rows in tuner(batch).items():
        torch.testing.assert_close(rows, start[stream], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["fixed", "e3va"])
def test_maps_whose_directions_are_all_kept_are_read_as_they_are(checkpoints, pictures, name):
    """With a mean, which heads must get back: e3va's corrections begin at zero."""
    checkpoint = Checkpoint(checkpoints["swin"], "swin")
    fixed, case = Case(checkpoint, "fixed", pictures), Case(checkpoint, name, pictures)
    start, batch = fixed.model().tuner(fixed.batch()), case.batch()
    widths = {s: checkpoint.backbone.full_width(s) for s in checkpoint.backbone.full_states() if s in batch.states}
    basis = {s: orthogonal({s: width}, width, 0).basis[s] for s, width in widths.items()}
    backbone = checkpoint.backbone.projected(Projection({s: torch.arange(w) / w for s, w in widths.items()}, basis))
    tuner = tuner_class(name)(case.config, backbone, case.tail, Want())
    batch.states = backbone.projection.apply(batch.states)
    assert len(widths) == 4 + (name == "e3va")
    for stream, rows in tuner(batch).items():
        torch.testing.assert_close(rows, start[stream], rtol=1e-3, atol=1e-3)


def test_options_that_do_nothing_are_refused():
    for options, said in (({"adapter": "plain", "alpha": 16}, "alpha: the rank"), ({"middle": 8}, "middle: channels")):
        with pytest.raises(UserError, match=said):
            tuner_config("e3va", options)


@pytest.mark.parametrize("name", ["full", "lora", "adapter", "adaptformer", "bitfit", "norm-tuning", "partial-1"])
@pytest.mark.parametrize("backbone", ["swin", "swin_hf", "mobilenet", "vit"])
def test_baselines_start_at_the_frozen_pyramid_and_reach_all_they_train(checkpoints, pictures, backbone, name):
    case = Case(Checkpoint(checkpoints[backbone], backbone), "fixed", pictures)
    module = case.backbone.load(case.checkpoint.folder, torch.float32, "sdpa", "cpu")
    if backbone == "mobilenet" and name in ("lora", "adapter", "adaptformer"):
        with pytest.raises(UserError, match=f"{name}: "):
            BaselineModel(baseline(name), case.backbone, module, LINEAR)
        return
    model = BaselineModel(baseline(name), case.backbone, module, LINEAR).eval()
    batch = case.inputs.batch()
    start, found = case.model().tuner(case.batch()), model(batch)
    for stream, rows in start.items():
        torch.testing.assert_close(found[stream], rows, rtol=1e-3, atol=1e-3)
    generator = torch.Generator().manual_seed(0)
    sum((rows * torch.randn(rows.shape, generator=generator)).sum() for rows in found.values()).backward()
    trained = {n: p for n, p in model.tuner.model.named_parameters() if p.requires_grad}
    assert trained and not [n for n, p in trained.items() if p.grad is None]


def test_compare_sets_baselines_beside_tuners_on_masks(checkpoints, tmp_path):
    scenes = write_scenes(tmp_path / "scenes", {"train": 4, "val": 2, "test": 2})

    def run(*words):
        result = CliRunner().invoke(main, [*map(str, words), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    words = ["--model", checkpoints["swin"], "--task", scenes, "--store", tmp_path / "store", "--objective"]
    words += ["segmentation"]
    run("extract", *words, "--for", "fixed,e3va", "--image-size", "own")
    made = run("compare", *words, "--tuners", "fixed,e3va,norm-tuning,adapter", "--seeds", "0", "--epochs", 1,
               "--head", "linear", "--out", tmp_path / "compare")  # fmt: skip
    rows = {row["method"]: row for row in made["rows"]}
    assert rows.keys() == {"fixed", "e3va", "norm-tuning", "adapter"}
    for name, row in rows.items():
        kept = json.loads((tmp_path / "compare" / f"{name}-s0" / "metrics.json").read_text())
        assert (row["metric"], row["figure"]) == (kept["test"]["miou"], "miou")
    head = rows["fixed"]["trainable"]
    width = sum(8 * 2**i for i in range(4))
    assert head == width * 4 + 4
    blocks = 2 * width
    assert rows["adapter"]["trainable"] - head == 2 * (129 * blocks + 64 * 8)


def test_the_simple_pyramid_is_vitdets():
    neck = SimplePyramid(768, 16)
    maps = neck([torch.zeros(1, 768, 3, 5)])
    assert [tuple(m.shape) for m in maps] == [(1, 256, *size) for size in ((12, 20), (6, 10), (3, 5), (2, 3))]
    assert neck.strides == [4, 8, 16, 32] and SimplePyramid(32, 14).strides == [3.5, 7, 14, 28]
    assert SimplePyramid(32, 8).strides == [4, 8, 16, 32]
    kinds = [[type(m) for m in level if not isinstance(m, nn.LayerNorm)] for level in neck.levels]
    up, conv = nn.ConvTranspose2d, nn.Conv2d
    assert kinds == [[up, nn.GELU, up, conv, conv], [up, conv, conv], [conv, conv], [nn.MaxPool2d, conv, conv]]
    deconvolutions = (768 * 384 * 4 + 384 + 2 * 384) + (384 * 192 * 4 + 192) + (768 * 384 * 4 + 384)
    laterals = 256 * (192 + 384 + 768 + 768) + 4 * (9 * 256 * 256 + 4 * 256)
    assert sum(p.numel() for p in neck.parameters()) == deconvolutions + laterals
