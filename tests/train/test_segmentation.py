"""The segmentation objective on maps at hand: its loss, its score, its heads."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score
from torch.nn import functional as F

from pipeline.extract.backbones import Batch
from pipeline.extract.geometry import META, Geometry
from pipeline.store.errors import Notice, UserError
from pipeline.train.features import Feature
from pipeline.train.model import on_host
from pipeline.train.objective_configs import SegmentationConfig
from pipeline.train.objectives import Answers
from pipeline.train.objectives.maskheads import map_head
from pipeline.train.objectives.segmentation import MaskScorer, Segmentation

FEATURES = {f"stage{i}": Feature(4 * i, f"stage{i}", "map", 2 ** (i + 1)) for i in (1, 2, 3, 4)}
ANSWERS = Answers(("ground", "road", "sky"))


def png(values):
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    return out.getvalue()


def made(sizes, objective, flips=(), seed=0):
    """A batch of images of `sizes`, each padded to 32, with random maps and masks."""
    rng = np.random.default_rng(seed)
    geometries = []
    for i, (h, w) in enumerate(sizes):
        extent = (-(-h // 32) * 32, -(-w // 32) * 32)
        geometries.append(Geometry((h, w), extent, (h, w), flip=i in flips))
    lengths = {k: np.array([g.extent[0] * g.extent[1] // f.stride**2 for g in geometries]) for k, f in FEATURES.items()}
    masks = [rng.integers(0, 4, size, np.uint8) for size in sizes]  # 3 is no class
    batch = Batch({}, {}, lengths, metas=[{META: g.to_meta()} for g in geometries], index=np.arange(len(sizes)))
    items = [objective.encode(png(m), meta) for m, meta in zip(masks, batch.metas, strict=True)]
    batch.targets = objective.collate(items, batch)
    torch.manual_seed(seed)
    return batch, {k: torch.randn(int(lengths[k].sum()), f.width) for k, f in FEATURES.items()}, masks


def take(batch, rows, places, objective, masks):
    """The samples `places` of a batch with their rows."""
    bounds = {k: np.concatenate([[0], np.cumsum(n)]) for k, n in batch.lengths.items()}
    own = {k: torch.cat([rows[k][bounds[k][i] : bounds[k][i + 1]] for i in places]) for k in rows}
    lengths, metas = {k: n[places] for k, n in batch.lengths.items()}, [batch.metas[i] for i in places]
    one = Batch({}, {}, lengths, metas=metas, index=np.arange(len(places)))
    one.targets = objective.collate([objective.encode(png(masks[i]), batch.metas[i]) for i in places], one)
    return one, own


SIZES = [(40, 64), (64, 33), (40, 64)]


@pytest.mark.parametrize("head", ["upernet", "fcn", "linear"])
def test_no_image_sees_its_neighbours(head):
    objective = Segmentation(SegmentationConfig(head=head, head_width=None if head == "linear" else 8), ANSWERS)
    batch, rows, masks = made(SIZES, objective, flips=(2,))
    model = objective.head(FEATURES, None).eval()
    together = model.predict(rows, batch)["mask"]
    losses, weights = [], []
    for i in range(3):
        one, own = take(batch, rows, [i], objective, masks)
        (alone,) = model.predict(own, one)["mask"]
        assert torch.equal(alone, together[i]) and tuple(alone.shape) == SIZES[i] and int(alone.max()) <= 2
        losses.append(float(sum(model.losses(own, one).values()).detach())), weights.append(model.weight(one))
    assert weights == [float((m != 3).sum()) for m in masks]
    assert float(sum(model.losses(rows, batch).values()).detach()) == pytest.approx(
        np.average(losses, weights=weights), rel=1e-5
    )


def test_the_loss_is_the_mean_of_the_pixels_that_have_a_class():
    objective = Segmentation(SegmentationConfig(head="linear"), ANSWERS)
    batch, rows, masks = made([(32, 64)], objective)
    model = objective.head(FEATURES, None)
    maps = [rows[k].view(1, 32 // f.stride, 64 // f.stride, f.width).permute(0, 3, 1, 2) for k, f in FEATURES.items()]
    size = maps[0].shape[2:]
    joined = torch.cat([F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps], 1)
    logits = F.interpolate(model.main.classifier(joined), (32, 64), mode="bilinear", align_corners=False)
    chance, truth = logits.log_softmax(1)[0], torch.from_numpy(masks[0]).long()
    at = [(int(truth[y, x]), y, x) for y in range(32) for x in range(64) if truth[y, x] < 3]
    expected = -np.mean([float(chance[place].detach()) for place in at])
    assert model.losses(rows, batch).keys() == {"pixel"}
    assert float(model.losses(rows, batch)["pixel"].detach()) == pytest.approx(expected, rel=1e-5)


def test_the_auxiliary_head_is_there_in_training_alone():
    objective = Segmentation(SegmentationConfig(head_width=8, head_dropout=0.0), ANSWERS)
    batch, rows, _ = made(SIZES, objective)
    model = objective.head(FEATURES, None)
    found = model.train().losses(rows, batch)
    assert found.keys() == {"pixel", "auxiliary"} and model.eval().losses(rows, batch).keys() == {"pixel"}
    sum(found.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())  # one image a size too
    without = Segmentation(SegmentationConfig(head_width=8, auxiliary_weight=0.0), ANSWERS).head(FEATURES, None)
    assert not [k for k, _ in without.named_parameters() if k.startswith("auxiliary")]


def test_a_flipped_view_is_the_mirror_image():
    objective = Segmentation(SegmentationConfig(head="linear"), ANSWERS)
    batch, rows, _ = made([(32, 64)], objective)
    mirrored = {k: v.view(32 // f.stride, 64 // f.stride, -1).flip(1).flatten(0, 1) for (k, v), f in
                zip(rows.items(), FEATURES.values(), strict=True)}  # fmt: skip
    other, _, _ = made([(32, 64)], objective, flips=(0,))
    model = objective.head(FEATURES, None).eval()
    for name, value in model.losses(rows, batch).items():
        torch.testing.assert_close(model.losses(mirrored, other)[name], value)
    assert torch.equal(model.predict(mirrored, other)["mask"][0], model.predict(rows, batch)["mask"][0])


def test_scores_are_those_of_scikit_learn_whatever_the_batches():
    objective = Segmentation(SegmentationConfig(head="linear"), ANSWERS)
    batch, rows, masks = made(SIZES, objective)
    model, whole, parts = (
        objective.head(FEATURES, None).eval(),
        objective.scorer(),
        [objective.scorer() for _ in range(2)],
    )
    whole.update(on_host(model.measure(rows, batch)), batch)
    for places, scorer in (([0, 1], parts[0]), ([2], parts[1])):
        one, own = take(batch, rows, places, objective, masks)
        scorer.update(on_host(model.measure(own, one)), one)
    parts[0].merge(parts[1])
    assert parts[0].compute() == whole.compute()
    told = np.concatenate([m.numpy().reshape(-1) for m in model.predict(rows, batch)["mask"]])
    truth = np.concatenate([m.reshape(-1) for m in masks])
    known = truth != 3
    assert whole.compute() == pytest.approx(
        {
            "miou": jaccard_score(truth[known], told[known], average="macro"),
            "pixel_accuracy": accuracy_score(truth[known], told[known]),
        }
    )


def test_classes_neither_there_nor_told_do_not_count():
    scorer = MaskScorer(3)
    scorer.update({"confusion": torch.tensor([[6, 2, 0], [0, 2, 0], [0, 0, 0]])}, None)
    assert scorer.compute() == pytest.approx({"miou": (6 / 8 + 2 / 4) / 2, "pixel_accuracy": 0.8})
    with pytest.warns(Notice, match="undefined"):
        assert all(np.isnan(value) for value in MaskScorer(3).compute().values())


def test_a_report_tells_each_class_whose_mean_is_the_score():
    objective = Segmentation(SegmentationConfig(), ANSWERS)
    report, counts = objective.report(), torch.tensor([[6, 2, 0], [0, 2, 0], [0, 0, 0]])
    for _ in range(2):
        report.update({"confusion": counts}, None)
    found = report.compute()
    assert found["rows"] == [
        {"name": "ground", "iou": 6 / 8, "precision": 1.0, "recall": 6 / 8, "pixels": 16},
        {"name": "road", "iou": 2 / 4, "precision": 2 / 4, "recall": 1.0, "pixels": 4},
        {"name": "sky", "iou": None, "precision": None, "recall": None, "pixels": 0},
        {"name": "mean", "iou": 0.625, "precision": 0.75, "recall": 0.875, "pixels": 20},
    ]
    assert found["confusion"] == (2 * counts).tolist() and found["labels"] == list(ANSWERS.labels)
    assert objective.report().compute()["rows"][-1]["iou"] is None


def test_the_figures_asked_for_are_told_and_the_first_selects():
    objective = Segmentation(SegmentationConfig(metric=("pixel_accuracy",)), ANSWERS)
    scorer = objective.scorer()
    scorer.update({"confusion": torch.tensor([[6, 2, 0], [0, 2, 0], [0, 0, 0]])}, None)
    assert scorer.compute() == {"pixel_accuracy": 0.8} and scorer.value(scorer.compute()) == 0.8
    usual = Segmentation(SegmentationConfig(), ANSWERS).scorer()
    assert usual.first == "miou" and usual.value({"miou": 0.25, "pixel_accuracy": 0.5}) == 0.25


@pytest.mark.parametrize(("width", "count"), [(128, 33_315_990), (192, 36_953_238)])
def test_upernet_has_its_published_parameters(width, count):
    config = SegmentationConfig()
    with torch.device("meta"):
        head = map_head([width * 2**i for i in range(4)], 150, config)
    assert sum(p.numel() for p in head.parameters()) == count and head.classifier[0].p == 0.1


def test_images_and_masks_that_do_not_belong_together_are_refused():
    objective = Segmentation(SegmentationConfig(), ANSWERS)
    meta = {META: Geometry((4, 4), (32, 32), (4, 4)).to_meta()}
    with pytest.raises(UserError, match="a mask of the task table has 5x4 pixels, its image 4x4"):
        objective.encode(png(np.zeros((5, 4), np.uint8)), meta)
