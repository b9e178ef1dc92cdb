"""Images are turned as their EXIF orientation says, and those of too many pixels are refused before they are
decoded."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.extract.backbones import TextOptions
from pipeline.extract.backbones.images import MOST_PIXELS, Preprocess, look, open_image
from pipeline.extract.feature_space import SpaceOptions, space_identity
from pipeline.extract.pretrained import Checkpoint
from pipeline.store import UserError

# What an EXIF orientation means for the pixels of a file, in numpy's terms (EXIF 2.3, tag 0x0112).
MEANT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x),
}


def photo(path: Path, orientation: int) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 255, (24, 40, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(values).save(path, exif=exif)
    return values


@pytest.mark.parametrize("orientation", MEANT)
def test_pictures_are_turned_as_their_exif_says(tmp_path, orientation):
    values = photo(tmp_path / "photo.png", orientation)
    expected = MEANT[orientation](values)
    assert np.array_equal(np.asarray(open_image(tmp_path / "photo.png", upright=True)), expected)
    assert np.array_equal(np.asarray(open_image(tmp_path / "photo.png", upright=False)), values)
    own = look(tmp_path / "photo.png", Preprocess(size=()), 0, 0, upright=True)
    assert own.extent == expected.shape[:2] and own.pixels().shape[1:] == expected.shape[:2]


def test_an_orientation_that_means_nothing_leaves_the_picture_as_it_is(tmp_path):
    for orientation in (0, 9, 300):
        values = photo(tmp_path / "photo.png", orientation)
        assert np.array_equal(np.asarray(open_image(tmp_path / "photo.png", upright=True)), values)


def test_orientation_is_part_of_the_identity(checkpoints):
    checkpoint = Checkpoint(checkpoints["cifar"], "cifar")
    now = space_identity(checkpoint, SpaceOptions())
    before = space_identity(checkpoint, SpaceOptions(text=TextOptions(upright=False)))
    assert now["orientation"] == "exif" and {k: v for k, v in now.items() if k != "orientation"} == before
    text = Checkpoint(checkpoints["bert"], "bert")
    assert "orientation" not in space_identity(text, SpaceOptions())


def test_states_of_a_turned_photo_are_those_of_the_upright_one(checkpoints, tmp_path):
    checkpoint = Checkpoint(checkpoints["cifar"], "cifar")
    values = photo(tmp_path / "turned.png", 6)
    Image.fromarray(np.rot90(values, -1)).save(tmp_path / "upright.png")
    backbone = checkpoint.backbone
    model = backbone.load(checkpoint.folder, torch.float32, "sdpa", "cpu")
    name = backbone.states()[-1]
    states = []
    for upright in (True, False):
        options = TextOptions(root=str(tmp_path), upright=upright)
        inputs = backbone.prepare(checkpoint.tokenizer, [("turned.png",), ("upright.png",)], options)
        found = backbone.run(model, inputs.batch(), [name])[name]
        states.append(found.view(2, -1, found.shape[1]))
    assert torch.equal(states[0][0], states[0][1]) and not torch.equal(states[1][0], states[1][1])


def large(path: Path, wide: int, tall: int) -> Path:
    """A PNG whose header claims this size; of its pixels there is one line."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", wide, tall, 8, 2, 0, 0, 0))
    line = chunk(b"IDAT", zlib.compress(b"\0" * (3 * wide + 1)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + line + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("side", [12_000, 60_000])
@pytest.mark.filterwarnings("error")  # nothing else is said about it
def test_pictures_of_too_many_pixels_are_refused(checkpoints, tmp_path, side):
    large(tmp_path / "large.png", side, side)
    photo(tmp_path / "small.png", 1)
    checkpoint = Checkpoint(checkpoints["cifar"], "cifar")
    options = TextOptions(root=str(tmp_path))
    with pytest.raises(UserError, match=rf"large\.png: .*more than {MOST_PIXELS:,} pixels.*--skip-bad"):
        checkpoint.backbone.prepare(checkpoint.tokenizer, [("small.png",), ("large.png",)], options)
    skipping = TextOptions(root=str(tmp_path), skip_bad=True)
    kept = checkpoint.backbone.prepare(checkpoint.tokenizer, [("small.png",), ("large.png",)], skipping)
    assert len(kept) == 1 and list(kept.skipped) == [1]
