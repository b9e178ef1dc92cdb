"""Task tables with objects that no extraction of ours writes are refused before anything is trained on them."""

from __future__ import annotations

import pytest

from pipeline.checks.doubtful_rows import doubts
from pipeline.checks.stored import check_table
from pipeline.extract.geometry import META, Geometry
from pipeline.extract.tasks.base import TaskSpec
from pipeline.store import TaskTable
from pipeline.store.errors import StoreError
from pipeline.store.tables import parquet
from tests.train.test_detection import thing

SPEC = TaskSpec("t", "instances", ("a", "b"), (), ("image",), "t image: {0}", values=(2, 5)).to_dict()
META_OF = {META: Geometry((40, 64), (64, 64), (40, 64)).to_meta()}


def table(objects, meta=META_OF, spec=SPEC):
    header = {"task": "t", "split": "train", "rows": 1, "spec": spec, "candidates": [], "version": "0" * 32}
    return TaskTable(header, ["0" * 32], [objects], [["1.jpg"]], [], [meta])


def kept(objects):
    """What the file gives back."""
    made = table(objects)
    data = parquet.dump(made.header, made.keys, made.labels, made.texts, made.ids, made.metas, {})
    return parquet.read_rows(data, 1, "t")[1][1][0]


def test_objects_come_back_as_they_were():
    for objects in ([thing((1, 2, 3.5, 4)), thing((0, 0, 64, 40), 1, crowd=True)], []):
        assert kept(objects) == objects
        check_table(table(objects), "t")


WRONG = {
    "reaches outside its image": thing((0, 0, 65, 40)),
    "has no area": thing((5, 5, 5, 9)),
    "of none of the 2 classes": thing((0, 0, 5, 5), 2),
    "other fields than objects": {"left": 0.0},
    "no outline": thing((0, 0, 5, 5), outline=None),
    "not four finite numbers": thing((0, 0, 5, 5), left=float("nan")),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_makes_no_sense_is_refused(said):
    with pytest.raises(StoreError, match=said):
        check_table(table([WRONG[said]]), "t")


def test_geometry_is_needed_and_values_are_finite():
    with pytest.raises(StoreError, match="where its image shows what"):
        check_table(table([thing((0, 0, 5, 5))], {}), "t")
    with pytest.raises(ValueError, match="not of the others' type"):
        kept([{"left": 1.0}])
    with pytest.raises(ValueError, match="a row is malformed"):
        kept([thing((0, 0, 5, 5), area=float("inf"))])
    with pytest.raises(ValueError, match="a row is malformed"):
        kept([thing((0, 0, 5, 5), outline=None)])


def test_boxes_of_two_corners_are_doubted():
    """x0, y0, x1, y1 where left, top, width, height belong: within the image, so that nothing else is wrong."""
    right, wrong = thing((10, 10, 20, 20)), thing((10, 10, 20, 20), width=20.0, height=20.0)
    crowd = thing((0, 0, 5, 5), outline='{"size":[40,64],"counts":[2560]}')
    assert doubts({"train": table([right, crowd])}, images=True) == []
    (said,) = doubts({"train": table([right, wrong, crowd])}, images=True)
    assert said.startswith("1 of 2 boxes are not those of their outlines, first in '1.jpg': are they left, top")
