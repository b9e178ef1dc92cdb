"""A painted square is found again by its pixels where the geometry of each view says, and carried back."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipeline.extract.backbones.images import Preprocess, look
from pipeline.extract.backbones.views import View
from pipeline.extract.geometry import META, Geometry

BOX = (30, 20, 58, 60)  # x0, y0, x1, y1
FRAMES = {
    "own": Preprocess((), mean=(0, 0, 0), std=(1, 1, 1)),
    "stretched": Preprocess((70, 120), 0.0, "bilinear", (0, 0, 0), (1, 1, 1)),
    "fitted": Preprocess((), 0.0, "bilinear", (0, 0, 0), (1, 1, 1), (120, 130)),
    "cut": Preprocess((64, 64), 0.875, "bilinear", (0, 0, 0), (1, 1, 1)),
}


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    values = np.zeros((81, 97, 3), np.uint8)
    values[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    path = tmp_path_factory.mktemp("painted") / "square.png"
    Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("view", range(6))
def test_boxes_and_masks_land_where_the_pixels_are(painted, frame, view):
    picture = look(painted, FRAMES[frame], view, 3, stride=32)
    pixels, geometry = picture.pixels()[0].numpy(), picture.geometry()
    assert pixels.shape == geometry.extent and all(n % 32 == 0 for n in geometry.extent)
    assert not pixels[geometry.seen[0] :].any() and not pixels[:, geometry.seen[1] :].any()
    shown = pixels[: geometry.seen[0], : geometry.seen[1]] > 0.35  # half of the square's brightness, colours changed
    mask = np.zeros(geometry.size, np.uint8)
    mask[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 1
    carried = geometry.mask(mask, 255)
    assert carried.shape == geometry.seen
    overlap = (shown & (carried == 1)).sum() / (shown | (carried == 1)).sum()
    assert overlap > (0.999 if view == 0 and frame == "own" else 0.9)
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    (box,) = geometry.boxes(np.array([BOX]))
    assert np.abs(box - found).max() <= 1.5  # the edge lies within a pixel, as blurred as it is
    inside = (box[0] > 0, box[1] > 0, box[2] < geometry.seen[1], box[3] < geometry.seen[0])
    back = geometry.back(box[None])[0]
    assert all(abs(a - b) < 1e-6 for a, b, seen in zip(back, BOX, inside, strict=True) if seen)


def test_a_flip_is_exact():
    values = np.arange(35, dtype=np.uint8).reshape(5, 7)
    plain = Geometry((5, 7), (5, 7), (5, 7))
    view = View((0, 0, 7, 5), True, (1.0, 1.0, 1.0))
    turned = view.geometry(plain)
    image = np.asarray(view.apply(Image.fromarray(np.stack([values] * 3, 2))))[..., 0]
    assert np.array_equal(turned.mask(values, 255), image) and np.array_equal(image, values[:, ::-1])
    assert turned.whole and not turned.plain and turned.boxes(np.array([[1, 2, 3, 4]])).tolist() == [[4, 2, 6, 4]]
    assert Geometry.of({META: turned.to_meta()}) == turned


def test_what_lies_outside_of_a_view_is_void_and_without_area():
    view = Geometry((10, 10), (32, 32), (10, 10), (2.0, 2.0), (10.0, 10.0))  # the lower right quarter, twice as large
    assert view.mask(np.ones((10, 10), np.uint8), 255).all() and not view.whole
    assert (view.boxes(np.array([[0, 0, 4, 4], [4, 4, 7, 20]])) == [[0, 0, 0, 0], [0, 0, 4, 10]]).all()
    wide = Geometry((4, 4), (8, 8), (8, 8))
    assert (wide.mask(np.ones((4, 4), np.uint8), 255)[4:] == 255).all()
