"""The objectives detection and instances on maps at hand: what is learned, what is told, how it is scored."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from pipeline.cost.flops import NoValues, kept_bytes
from pipeline.extract.backbones import Batch
from pipeline.extract.geometry import META, Geometry
from pipeline.store.errors import Notice, UserError
from pipeline.train.box_configs import DetectionConfig, InstancesConfig
from pipeline.train.features import Feature
from pipeline.train.objectives import Answers
from pipeline.train.objectives.boxheads import in_place
from pipeline.train.objectives.boxparts import Anchors, Pool
from pipeline.train.objectives.boxscores import BOXES, MASKS, VOC, Objects, ObjectScorer, VocMatches, objects_there
from pipeline.train.objectives.cascade import CascadeHeads
from pipeline.train.objectives.detection import Detection, Instances

FEATURES = {f"stage{i}": Feature(4 * i, f"stage{i}", "map", 2 ** (i + 1)) for i in (1, 2, 3, 4)}
ANSWERS = Answers(("cat", "dog", "car"), values=(2.0, 3.0, 7.0))
HEADS = {
    "retinanet": Detection, "faster-rcnn": Detection, "cascade-rcnn": Detection, "mask-rcnn": Instances,
    "cascade-mask-rcnn": Instances,
}  # fmt: skip


def objective(head: str, **more):
    kind = HEADS[head]
    return kind(kind.config_class(head=head, head_width=8, **more), ANSWERS)


def thing(box, kind=0, **more):
    left, top, right, bottom = (float(v) for v in box)
    outline = json.dumps([[left, top, right, top, right, bottom, left, bottom]])
    return {
        "left": left, "top": top, "width": right - left, "height": bottom - top, "class": kind, "crowd": False,
        "difficult": False, "area": (right - left) * (bottom - top), "outline": outline, **more,
    }  # fmt: skip


def geometry(size, flip=False):
    extent = tuple(-(-n // 32) * 32 for n in size)
    return Geometry(size, extent, size, flip=flip)


def made(geometries, things, of, seed=0):
    """A batch of images with random maps."""
    lengths = {k: np.array([g.extent[0] * g.extent[1] // f.stride**2 for g in geometries]) for k, f in FEATURES.items()}
    metas = [{META: g.to_meta()} for g in geometries]
    batch = Batch({}, {}, lengths, metas=metas, index=np.arange(len(geometries)))
    batch.targets = of.collate([of.encode(t, m) for t, m in zip(things, metas, strict=True)], batch)
    torch.manual_seed(seed)
    return batch, {k: torch.randn(int(lengths[k].sum()), f.width) for k, f in FEATURES.items()}


THINGS = [[thing((2, 3, 30, 28), 1), thing((20, 8, 60, 36), 0)], [thing((5, 40, 25, 60), 2)], []]
GEOMETRIES = [geometry((40, 64)), geometry((64, 33), flip=True), geometry((40, 64))]


@pytest.mark.parametrize("head", HEADS)
def test_no_image_sees_its_neighbours(head):
    of = objective(head, score_threshold=0.0, detections=5)
    batch, rows = made(GEOMETRIES, THINGS, of)
    torch.manual_seed(1)
    model = of.head(FEATURES, None).eval()
    together = model.predict(rows, batch)["objects"]
    bounds = {k: np.concatenate([[0], np.cumsum(n)]) for k, n in batch.lengths.items()}
    for i, found in enumerate(together):
        one, _ = made(GEOMETRIES[i : i + 1], THINGS[i : i + 1], of)
        own = {k: rows[k][bounds[k][i] : bounds[k][i + 1]] for k in rows}
        (alone,) = model.predict(own, one)["objects"]
        assert len(found.boxes) == 5 and np.allclose(alone.boxes, found.boxes, atol=1e-3)
        assert np.allclose(alone.scores, found.scores, atol=1e-5) and len(alone.runs) == (5 if of.masks else 0)
    model.train()
    losses = model.losses(rows, batch)
    total = sum(losses.values())
    total.backward()
    assert torch.isfinite(total) and float(total.detach()) > 0
    trained = [p for p in model.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(trained) > 0.8 * len(list(model.parameters()))


@pytest.mark.parametrize("head", ["faster-rcnn", "cascade-rcnn"])
def test_what_is_drawn_follows_from_the_seed_alone(head):
    of = objective(head, proposals=16)
    batch, rows = made(GEOMETRIES, THINGS, of)
    torch.manual_seed(1)
    model = of.head(FEATURES, None).train()
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(float(sum(model.losses(rows, batch).values()).detach()))
    assert found[0] == found[1] != found[2]


COUNTED = {**{name: {} for name in HEADS}, "cascade-rcnn fc": {"box_head": "fc"}}


@pytest.mark.parametrize("name", COUNTED)
def test_what_plan_counts_of_a_step_is_what_a_step_does(name):
    """Operations, and bytes kept for the backward pass: on the meta device as in a step that draws all it may."""
    head = name.split()[0]
    of = objective(head, **COUNTED[name], **({} if head == "retinanet" else {"proposals": 4}))
    batch, rows = made(GEOMETRIES[:2], THINGS[:2], of)
    model, steps = of.head(FEATURES, None).train(), []
    with torch.device("meta"):
        counted = of.head(FEATURES, None).train()
    bare = Batch({}, {}, batch.lengths, metas=batch.metas, index=batch.index)
    nothing = {k: v.to("meta") for k, v in rows.items()}
    for module, losses in (
        (model, lambda: model.losses(rows, batch)),
        (counted, lambda: counted.outlined(nothing, bare)),
    ):
        with NoValues(), FlopCounterMode(display=False) as flops:
            sum(losses().values()).backward()
        kept = kept_bytes((*module.parameters(), *rows.values(), *nothing.values()), losses)
        steps.append((flops.get_total_flops(), kept))
    (real, kept), (found, outlined) = steps
    assert real == found > 0 and outlined == pytest.approx(kept, rel=0.25)


def test_boxes_are_drawn_by_where_they_lie():
    boxes = torch.tensor([[5.0, 0, 9, 9], [0, 3, 9, 9], [0, 3, 8, 9], [0, 1, 9, 9]])
    assert in_place(boxes)[:, 0].tolist() == [0, 0, 0, 5] and in_place(boxes)[:, 1].tolist() == [1, 3, 3, 0]
    assert torch.equal(in_place(boxes), in_place(boxes[torch.tensor([2, 0, 3, 1])]))


def test_anchors_are_the_librarys_where_extents_divide_and_at_their_maps_elsewhere():
    maps = [torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 4, 2)]
    images = ImageList(torch.empty(1, 3, 64, 32, device="meta"), [(64, 32)])
    sizes = ((32.0,), (64.0,))
    (ours,), (theirs,) = (
        Anchors(sizes, (8, 16))(images, maps),
        AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 2)(images, maps),
    )
    assert torch.equal(ours, theirs)
    (own,) = Anchors(((64.0,),), (64,))(images, [torch.zeros(1, 1, 2, 1)])  # of an extent of 96: the library has 48
    assert own.view(2, 3, 4)[1, 1].tolist() == [-32, 32, 32, 96]


def test_pooling_reads_the_level_of_a_boxs_size():
    pool = Pool(["0", "1", "2", "3"], (4, 8, 16, 32), 7)
    maps = {str(i): torch.full((1, 1, 64 >> i, 64 >> i), float(i)) for i in range(4)}
    boxes = torch.tensor([[0.0, 0, 50, 50], [0, 0, 120, 120], [0, 0, 230, 230], [0, 0, 250, 250]])
    found = pool(maps, [boxes], [(250, 250)])[:, 0, 3, 3]
    assert found.tolist() == [0, 1, 2, 2]


def test_what_is_learned_and_what_is_scored():
    of = objective("mask-rcnn")
    things = [
        thing((2, 3, 30, 28), 1), thing((0, 0, 9, 9), 0, crowd=True), thing((1, 1, 9, 9), 2, difficult=True),
        thing((10, 10, 10.5, 20), 0),
    ]  # fmt: skip
    item = of.encode(things, {META: geometry((40, 64), flip=True).to_meta()})
    assert item["box"].tolist() == [[34, 3, 62, 28]] and item["label"].tolist() == [1]
    mask = item["mask"].reshape(40, 64)
    assert mask[3:28, 34:62].all() and mask.sum() == 25 * 28
    assert item["truth_class"].tolist() == [1, 0, 2, 0] and item["truth_crowd"].tolist() == [False, True, False, False]
    assert item["truth_box"][0].tolist() == [2, 3, 28, 25]
    batch, _ = made(GEOMETRIES, [things, [], THINGS[0]], of)
    there = objects_there(batch)
    assert [len(o.boxes) for o in there] == [4, 0, 2] and there[0].runs[0]["size"] == [40, 64]
    # Of a view that cuts, what it shows is learned, and scored in its own pixels.
    cut = Geometry((40, 64), (32, 32), (32, 32), (2.0, 2.0), (0.0, 32.0))
    item = of.encode([thing((2, 3, 30, 28), 1), thing((50, 0, 60, 9), 0)], {META: cut.to_meta()})
    assert item["box"].tolist() == [[0, 6, 28, 32]] and item["truth_box"].tolist() == [[0, 6, 28, 26]]
    assert len(item["runs_length"]) == 1 and item["truth_size"].tolist() == [32, 32]


def random_objects(rng, found: bool, masks: bool, of, size=(40, 64)):
    things = []
    for _ in range(rng.integers(0, 6)):
        x, y = rng.integers(0, 40), rng.integers(0, 20)
        wide, tall = rng.integers(4, 24), rng.integers(4, 20)
        things.append(
            thing((x, y, x + wide, y + tall), int(rng.integers(0, 3)), crowd=bool(rng.random() < 0.15 and not found))
        )
    return things


def test_figures_are_those_of_pycocotools_on_the_written_json(tmp_path):
    rng, of = np.random.default_rng(0), objective("mask-rcnn")
    scorers, images, annotations, entries = [of.scorer(), of.scorer(), of.scorer()], [], [], []
    for i in range(6):
        true = random_objects(rng, False, True, of)
        shown = [geometry((40, 64))]
        batch, _ = made(shown, [true], of)
        batch.index = np.array([10 + i])
        guesses = [t for t in true if rng.random() < 0.8] + random_objects(rng, True, True, of)
        told = objects_there(made(shown, [guesses], of)[0])[0]
        moved = told.boxes + rng.uniform(-2, 2, told.boxes.shape) * (rng.random() < 0.7)
        moved[:, 2:] = moved[:, 2:].clip(1)
        out = Objects(moved, told.classes, rng.random(len(moved)).round(2), runs=told.runs)
        for scorer in (scorers[0], scorers[1 + i % 2]):
            scorer.update({"objects": [out]}, batch)
        order = np.argsort(-out.scores, kind="stable")
        out = Objects(out.boxes[order], out.classes[order], out.scores[order], runs=[out.runs[k] for k in order])
        entries += of.entries({"objects": [out]})
        images.append({"id": 10 + i, "height": 40, "width": 64})
        truth = objects_there(batch)[0]
        for k, t in enumerate(true):
            annotations.append({
                "id": len(annotations) + 1, "image_id": 10 + i, "area": t["area"],
                "category_id": of.numbers[t["class"]],
                "bbox": [t[n] for n in ("left", "top", "width", "height")], "iscrowd": int(t["crowd"]),
                "segmentation": truth.runs[k],
            })  # fmt: skip
    scorers[1].merge(scorers[2])
    figures = scorers[0].compute()
    assert figures == pytest.approx(scorers[1].compute(), nan_ok=True)
    of.save_all(entries, [f"{10 + i}.jpg" for i in range(6)], tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        true = COCO()
        true.dataset = {"images": images, "annotations": annotations, "categories": [{"id": n} for n in of.numbers]}
        true.createIndex()
        for kind, names, file in (("bbox", BOXES, "detections"), ("segm", MASKS, "segmentations")):
            evaluation = COCOeval(true, true.loadRes(str(tmp_path / f"{file}.json")), kind)
            evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
            expected = [float("nan") if v < 0 else v for v in evaluation.stats[:6]]
            assert [figures[name] for name in names] == pytest.approx(expected, nan_ok=True)
    assert 0.1 < figures["mask_ap50"] < 0.99 and 0.1 < figures["box_ap50"] < 0.99


def test_voc_has_eleven_points_and_an_area_and_difficult_ones_do_not_count():
    found = Objects(
        np.array([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 5, 5], [20, 20, 10, 10], [80, 80, 9, 9]], float),
        np.zeros(5, int), np.array([0.9, 0.8, 0.7, 0.6, 0.5]),
    )  # fmt: skip
    true = Objects(
        np.array([[0, 0, 10, 10], [20, 20, 10, 10], [80, 80, 9, 9]], float), np.zeros(3, int), areas=np.ones(3),
        crowd=np.zeros(3, bool), difficult=np.array([False, False, True]),
    )  # fmt: skip
    matches = VocMatches(2)
    matches.take(0, true, found)
    # right, twice, wrong, right, not counted: precision 1, 1/2, 1/3, 1/2 at recall 1/2, 1/2, 1/2, 1
    assert matches.compute() == pytest.approx({"voc07_ap50": (6 * 1 + 5 * 0.5) / 11, "voc_ap50": 0.5 * 1 + 0.5 * 0.5})
    assert ObjectScorer(2, VOC).first == "voc07_ap50"


def test_without_an_object_figures_are_undefined():
    of = objective("retinanet")
    batch, rows = made(GEOMETRIES[:1], [[]], of)
    scorer = of.scorer()
    scorer.update(of.head(FEATURES, None).eval().predict(rows, batch), batch)
    with pytest.warns(Notice, match="box_map is undefined"):
        assert all(np.isnan(v) for v in scorer.compute().values())


def test_a_flipped_view_is_told_as_the_image():
    of = objective("mask-rcnn", score_threshold=0.0, detections=4)
    model = of.head(FEATURES, None).eval()
    batch, rows = made([geometry((32, 64), flip=True)], [[]], of)
    (found,) = model.predict(rows, batch)["objects"]
    plain, _ = made([geometry((32, 64))], [[]], of)
    (seen,) = model.predict(rows, plain)["objects"]
    mirrored = 64 - seen.boxes[:, 0] - seen.boxes[:, 2]
    assert np.allclose(found.boxes[:, 0], mirrored, atol=1e-4) and np.allclose(found.boxes[:, 1:], seen.boxes[:, 1:])


def test_boxes_of_a_cascade_are_matched_more_strictly_and_moved():
    of = objective("cascade-rcnn")
    heads = of.head(FEATURES, None).net.heads
    assert isinstance(heads, CascadeHeads)
    true = torch.tensor([[0.0, 0, 10, 10]])
    near = torch.tensor([[0.0, 0, 10, 5.5], [0, 0, 10, 6.5], [0, 0, 10, 7.5], [30, 30, 40, 40]])
    target = {"boxes": true, "labels": torch.tensor([2])}
    assert box_iou(true, near)[0].tolist() == pytest.approx([0.55, 0.65, 0.75, 0])
    assert [heads._match(stage, near, target)[1].tolist() for stage in range(3)] == [
        [2, 2, 2, 0], [0, 2, 2, 0], [0, 0, 2, 0]
    ]  # fmt: skip
    for stage, coder in enumerate(heads.coders):
        deltas = coder.encode_single(true.expand(3, 4), near[:3])[:, None].expand(3, 4, 4)
        moved = heads._moved(stage, deltas, near[:3], torch.tensor([2, 2, 2]), [(40, 40)])
        assert torch.allclose(moved, true.expand(3, 4), atol=1e-4)
        loss = heads._box_loss(
            stage, deltas, near[:3], torch.zeros(3, dtype=torch.int64), torch.tensor([2, 2, 2]), target
        )
        assert float(loss) == pytest.approx(0, abs=1e-4)


REFUSED = [
    (DetectionConfig, {"head": "mask-rcnn"}, "head: one of retinanet"),
    (DetectionConfig, {"proposals": 64}, "proposals: retinanet has anchors alone"),
    (InstancesConfig, {"box_head": "fc"}, "box_head: a cascade has the choice, mask-rcnn has none"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "options", "said"), REFUSED)
def test_options_that_do_nothing_are_refused(config, options, said):
    with pytest.raises(ValueError, match=said):
        config(**options)


def test_damaged_outlines_and_unknown_figures_are_refused():
    of = objective("mask-rcnn")
    with pytest.raises(UserError, match="an outline of the task table is damaged"):
        of.encode([thing((0, 0, 5, 5), outline="[[0, 0]]")], {META: geometry((8, 8)).to_meta()})
    with pytest.raises(UserError, match="objective detection is scored by box_map"):
        Detection(DetectionConfig(metric=("mask_map",)), ANSWERS)


@pytest.mark.parametrize("images", [["a/7.png", "b/7.png"], ["7.png", "007.png"], ["7.png", "x.png"]])
def test_two_images_are_never_told_under_one_number(images, tmp_path):
    entry = {"objects": [{"category_id": 2, "bbox": [0, 0, 1, 1], "score": 0.5}]}
    telling = Detection(DetectionConfig(), ANSWERS)
    telling.save_all([entry, entry], images, tmp_path)
    assert [row["image_id"] for row in json.loads((tmp_path / "detections.json").read_text())] == images
    telling.save_all([entry, entry], ["7.png", "8.png"], tmp_path)
    assert [row["image_id"] for row in json.loads((tmp_path / "detections.json").read_text())] == [7, 8]
