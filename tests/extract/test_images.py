"""Images as inputs: keys, preprocessing, views, bad files, sizes; and the states of image backbones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.extract.backbones import Inputs, TextOptions
from pipeline.extract.backbones.grids import cells, max_cells, mean_cells
from pipeline.extract.backbones.images import Preprocess
from pipeline.extract.feature_space import SpaceOptions, space_identity
from pipeline.extract.pretrained import Checkpoint
from pipeline.extract.tasks import TaskError, canonical_name, load_task
from pipeline.store import UserError
from tests import vision
from tests.pairs import IMAGES


@pytest.fixture(params=IMAGES)
def loaded(request, checkpoints):
    checkpoint = Checkpoint(checkpoints[request.param], request.param)
    return checkpoint, checkpoint.backbone, checkpoint.backbone.load(checkpoint.folder, torch.float32, "sdpa", "cpu")


def inputs_of(checkpoint, pictures, n=5, **options) -> Inputs:
    names = load_task(str(pictures)).splits["train"].texts[:n]
    return checkpoint.backbone.prepare(checkpoint.tokenizer, names, TextOptions(root=str(pictures), **options))


@torch.no_grad()
def whole(checkpoint, model, pixels):
    """The backbone's own forward pass to its last features: (b, rows, D)."""
    if checkpoint.config.model_type == "timm_wrapper":
        out = model.forward_features(pixels)
    else:
        out = model(pixels)
        out = out if isinstance(out, torch.Tensor) else out.last_hidden_state
    if out.ndim == 4:
        out = out.flatten(1, 2) if checkpoint.backbone.name == "swin" else out.flatten(2).transpose(1, 2)
    return out


def test_states_are_those_of_the_model_and_the_tail_continues_them(loaded, pictures):
    checkpoint, backbone, model = loaded
    inputs = inputs_of(checkpoint, pictures)
    batch = inputs.batch()
    states = backbone.run(model, batch, backbone.states())
    assert set(states) == set(backbone.states())
    stream = backbone.streams[-1]
    last = backbone.depth(stream) - 1
    tail = backbone.tail(backbone.tail_weights(model), "sdpa").eval()
    rows = tail({stream: states[f"{stream}.{last - 1}"]}, batch)
    torch.testing.assert_close(rows, states[f"{stream}.{last}"], rtol=0, atol=0)
    pixels = torch.stack([p.pixels() for p in inputs.pictures])
    expected = whole(checkpoint, model, pixels).flatten(0, 1)
    # transformers' CLIP vision tower normalises the class token alone
    found = rows if checkpoint.config.model_type == "clip_vision_model" else tail.final_norm(rows, stream)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_pictures_of_other_sizes_go_together(loaded, pictures, tmp_path):
    checkpoint, backbone, model = loaded
    for i, (wide, tall) in enumerate([(64, 64), (96, 64), (64, 64)]):
        name = ("a", "b")[i % 2]
        (tmp_path / name).mkdir(exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 255, (tall, wide, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / name / f"{i}.png")
    options = TextOptions(root=str(tmp_path), image_size="own")
    inputs = backbone.prepare(checkpoint.tokenizer, [("a/0.png",), ("b/1.png",), ("a/2.png",)], options)
    stream = backbone.streams[-1]
    names = [f"{stream}.{backbone.depth(stream) - i}" for i in (2, 1)]
    together = backbone.run(model, inputs.batch(), names)
    tail = backbone.tail(backbone.tail_weights(model), "sdpa").eval()
    torch.testing.assert_close(
        tail({stream: together[names[0]]}, inputs.batch()), together[names[1]], rtol=1e-4, atol=1e-5
    )
    at = 0
    for i in range(3):
        alone = backbone.run(model, inputs.take(np.array([i])).batch(), names)[names[1]]
        torch.testing.assert_close(alone, together[names[1]][at : at + len(alone)], rtol=1e-4, atol=1e-5)
        at += len(alone)
    assert at == len(together[names[1]])


def test_a_key_is_of_the_bytes_the_preprocessing_and_the_view(checkpoints, pictures, tmp_path):
    checkpoint = Checkpoint(checkpoints["cifar"], "cifar")
    inputs = inputs_of(checkpoint, pictures)
    keys = inputs.keys()
    assert len(set(keys)) == 5 and inputs.take(np.array([3, 1])).keys() == [keys[3], keys[1]]
    source = inputs.pictures[0].path
    (tmp_path / "copy.png").write_bytes(source.read_bytes())
    copy = checkpoint.backbone.prepare(checkpoint.tokenizer, [("copy.png",)], TextOptions(root=str(tmp_path)))
    assert copy.keys() == keys[:1]  # the name plays no part
    assert inputs_of(checkpoint, pictures, image_size="64x64").keys() != keys
    name = source.relative_to(pictures).as_posix()
    options = TextOptions(root=str(pictures))
    views = checkpoint.backbone.prepare(checkpoint.tokenizer, [(name, "0"), (name, "1"), (name, "2")], options)
    assert views.keys()[0] == keys[0] and len(set(views.keys())) == 3
    again = checkpoint.backbone.prepare(checkpoint.tokenizer, [(name, "1")], options)
    assert torch.equal(again.pictures[0].pixels(), views.pictures[1].pixels())
    assert not torch.equal(views.pictures[1].pixels(), views.pictures[0].pixels())
    other = checkpoint.backbone.prepare(checkpoint.tokenizer, [(name, "1")], replace(options, view_seed=1))
    assert other.keys() != again.keys()


def test_the_identity_says_what_pictures_are_made_of(checkpoints):
    checkpoint = Checkpoint(checkpoints["cifar"], "cifar")
    plain = space_identity(checkpoint, SpaceOptions())
    assert plain["image_size"] == "32x32" and plain["mean"] == "0.485,0.456,0.406" and plain["views"] == "none"
    larger = space_identity(checkpoint, SpaceOptions(text=TextOptions(image_size="64x64")))
    assert {k for k in plain if plain[k] != larger[k]} == {"image_size"}
    several = space_identity(checkpoint, SpaceOptions(text=TextOptions(views=3, view_seed=7)))
    assert several["views"].endswith("seed 7") and {k for k in plain if plain[k] != several[k]} == {"views"}


@pytest.mark.parametrize("what", ["damaged", "empty", "gray", "absent"])
def test_bad_pictures_are_named_and_left_out_only_when_asked(checkpoints, pictures, tmp_path, what):
    checkpoint = Checkpoint(checkpoints["cifar"], "cifar")
    good = next(pictures.rglob("*.png"))
    (tmp_path / "good.png").write_bytes(good.read_bytes())
    bad = tmp_path / "bad.png"
    if what == "damaged":
        bad.write_bytes(good.read_bytes()[:400])
    elif what == "empty":
        bad.write_bytes(b"")
    elif what == "gray":
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(bad)
    options, names = TextOptions(root=str(tmp_path)), [("good.png",), ("bad.png",), ("good.png",)]
    with pytest.raises(UserError, match=r"bad\.png: .*--skip-bad"):
        checkpoint.backbone.prepare(checkpoint.tokenizer, names, options)
    kept = checkpoint.backbone.prepare(checkpoint.tokenizer, names, replace(options, skip_bad=True))
    assert len(kept) == 2 and list(kept.skipped) == [1] and "bad.png" in kept.skipped[1]


def test_preprocessing_of_both_libraries(tmp_path, checkpoints):
    timm = Checkpoint(checkpoints["swin"], "swin").tokenizer
    assert timm == Preprocess((64, 64), 1.0, "bicubic", tuple(vision.MEAN), tuple(vision.STD))
    hf = Checkpoint(checkpoints["clip"], "clip").tokenizer
    assert hf == Preprocess((32, 32), 0.0, "bilinear", tuple(vision.MEAN), tuple(vision.STD))
    raw = {
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "resample": 3,
    }
    cropped = Preprocess._hugging_face(raw)
    assert cropped.size == (224, 224) and cropped.crop == 224 / 256 and cropped.interpolation == "bicubic"
    picture = Image.fromarray(np.zeros((300, 500, 3), np.uint8))
    assert cropped.pixels(cropped.frame(picture)).shape == (3, 224, 224)
    with pytest.raises(UserError, match="image-size"):
        cropped.sized("12y")


def test_cells_are_pooling_where_sizes_divide():
    maps = torch.randn(2, 3, 8, 4)
    rows = maps.flatten(2).transpose(1, 2).flatten(0, 1)
    fine, coarse = np.array([[8, 4]] * 2), np.array([[4, 2]] * 2)
    cell = cells(fine, coarse, torch.device("cpu"))
    for found, pool in ((mean_cells, torch.nn.functional.avg_pool2d), (max_cells, torch.nn.functional.max_pool2d)):
        expected = pool(maps, 2).flatten(2).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(found(rows, cell, 16), expected)


def test_folders_of_pictures(pictures, tmp_path):
    task = load_task(str(pictures))
    assert {s: len(r) for s, r in task.splits.items()} == {"train": 48, "validation": 6, "test": 6}
    assert task.spec.labels == ("left", "upper") and canonical_name(str(pictures)) == task.spec.name == "halves"
    for split in ("train", "val"):
        vision.write_folder(tmp_path / "own" / split, 6)
    own = load_task(str(tmp_path / "own"))
    assert {s: len(r) for s, r in own.splits.items()} == {"train": 6, "validation": 6} and "test" in own.absent
    (tmp_path / "own" / "val" / "odd").mkdir()
    (tmp_path / "own" / "val" / "left" / "000.png").rename(tmp_path / "own" / "val" / "odd" / "0.png")
    with pytest.raises(TaskError, match="'odd'"):
        load_task(str(tmp_path / "own"))
    with pytest.raises(TaskError, match="at least two classes"):
        load_task(str(tmp_path / "own" / "train" / "left"))
