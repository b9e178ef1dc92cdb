"""Tables of pairs: splits by image, columns, and the files of public data sets."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.extract.tasks import Task, TaskError, load_task
from pipeline.extract.tasks.captions import Paired
from pipeline.jobs.slots import parts_of, together
from pipeline.recipe import Recipe


def both(name: Path, **options: Any) -> tuple[Task, Task]:
    """The images or videos, and the captions."""
    return (
        load_task(str(name), paired=Paired(files=True), **options),
        load_task(str(name), paired=Paired(), **options),
    )


def karpathy(path: Path) -> Path:
    splits = ["train", "restval", "val", "test", "train"]
    images = [
        {
            "filename": f"{i}.jpg", "split": split, "filepath": "val2014",
            "sentences": [{"raw": f"a dog {i} {k}", "tokens": ["a"]} for k in range(5)],
        }
        for i, split in enumerate(splits)
    ]  # fmt: skip
    path.write_text(json.dumps({"dataset": "coco", "images": images}))
    return path


def test_karpathys_splits(tmp_path: Path) -> None:
    images, texts = both(karpathy(tmp_path / "dataset_coco.json"))
    assert {s: len(r) for s, r in images.splits.items()} == {"train": 15, "validation": 5, "test": 5}
    assert images.splits["test"].texts == [("val2014/3.jpg",)] * 5
    assert texts.splits["test"].texts[4] == ("a dog 3 4",)
    assert images.spec.target == "pair" and images.provenance["together"] == texts.provenance["together"] == "image"
    assert images.version != texts.version


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda images: images[3]["sentences"][2].pop("raw"), ["images[3]", "'raw'"]),
        (lambda images: images[4].pop("split"), ["images[4]", "'split'"]),
        (lambda images: images[1].pop("sentences"), ["images[1]", "'sentences'"]),
        (lambda images: images.__setitem__(2, "2.jpg"), ["images[2]", "not what an entry"]),
        (lambda images: images[3]["sentences"][2].update(raw=None), ["images[3], caption 3", "text, not None"]),
        (lambda images: images[3]["sentences"][2].update(raw=" "), ["images[3], caption 3", "text, not ' '"]),
        (lambda images: images[3]["sentences"][2].update(raw=True), ["images[3], caption 3", "text, not True"]),
        (lambda images: images[3]["sentences"][2].update(raw=math.nan), ["images[3], caption 3", "text, not nan"]),
        (lambda images: images[3].update(split=["train"]), ["images[3]", "split must be text"]),
    ],
)
def test_an_entry_of_karpathys_that_lacks_something(tmp_path: Path, change: Any, words: list[str]) -> None:
    path = karpathy(tmp_path / "dataset_coco.json")
    whole = json.loads(path.read_text())
    change(whole["images"])
    path.write_text(json.dumps(whole))
    with pytest.raises(TaskError) as refused:
        both(path)
    assert all(word in str(refused.value) for word in ("dataset_coco.json", *words))


def test_rows_stay_with_their_image_where_the_text_alone_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("image,caption\n" + "".join(f"{i}.png,it {i} {k}\n" for i in range(30) for k in range(3)))
    whole = Recipe(model="image=a,text=b", task=str(path), text="text=caption")
    parts = parts_of(whole)
    images, texts = (
        load_task(str(path), text=part.text, paired=Paired(together(part), slot == "image"))
        for slot, part in parts.items()
    )
    seen = {split: {name for (name,) in rows.texts} for split, rows in images.splits.items()}
    assert len(set.union(*seen.values())) == sum(map(len, seen.values())) == 30
    assert images.provenance["together"] == texts.provenance["together"] == "image"


def test_msrvtt_1k_a(tmp_path: Path) -> None:
    said = [{"caption": f"a man {v} {k}", "video_id": f"video{v}", "sen_id": 0} for v in range(30) for k in range(2)]
    path = tmp_path / "MSRVTT_data.json"
    path.write_text(json.dumps({"videos": [{"video_id": f"video{v}"} for v in range(30)], "sentences": said}))
    test = tmp_path / "MSRVTT_JSFUSION_test.csv"
    test.write_text("key,vid_key,video_id,sentence\n" + "".join(f"ret{v},msr{v},video{v},it {v}\n" for v in range(4)))
    videos, texts = both(path, test=test)
    assert {s: len(r) for s, r in videos.splits.items()} == {"train": 48, "validation": 4, "test": 4}
    rest = {t[0] for s in ("train", "validation") for t in videos.splits[s].texts}
    assert rest == {f"video{v}" for v in range(4, 30)}
    assert texts.splits["test"].texts == [(f"it {v}",) for v in range(4)]


def test_msvd(tmp_path: Path) -> None:
    lines = ["# a comment", "", *(f"v{i}_1_2 a cat {k}" for i in range(6) for k in range(i % 3 + 1))]
    (tmp_path / "AllVideoDescriptions.txt").write_text("\n".join(lines))
    for name, videos in (("train", (0, 1, 2)), ("val", (3,)), ("test", (4, 5))):
        (tmp_path / f"{name}_list.txt").write_text("".join(f"v{i}_1_2\n" for i in videos))
    videos, texts = both(tmp_path)
    assert {s: len(r) for s, r in videos.splits.items()} == {"train": 6, "validation": 1, "test": 5}
    assert texts.splits["test"].texts[-1] == ("a cat 2",)
    (tmp_path / "test_list.txt").write_text("v0_1_2\n")
    with pytest.raises(TaskError, match=r"v0_1_2 stands in train_list\.txt too"):
        both(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,caption,split\na.jpg,a cat,trian\n", "row 1 .*split 'trian'"),
        ("image,caption,split\na.jpg,a cat,test\n", "no row is of split train"),
        ("photo,words\na.jpg,a cat\n", "--image; columns there: photo, words"),
        ("image,caption\na.jpg,\nb.jpg,a cat\nc.jpg,a dog\n", "row 1 .*'caption' is empty"),
        ("image,caption\na.jpg,a cat\nb.jpg,a dog\nb.jpg,no dog\n", "2 distinct ones among its rows, too few"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(TaskError, match=words):
        both(path)


def test_a_split_that_is_no_word(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"image": "a.jpg", "caption": "a cat", "split": ["train"]}\n')
    with pytest.raises(TaskError, match=r"row 1 .*split \['train'\] is none of train"):
        both(path)


@pytest.mark.parametrize(("caption", "kind"), [("true", "bool"), ("NaN", "float")])
def test_a_caption_that_is_no_text(tmp_path: Path, caption: str, kind: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f'{{"image": "{i}.jpg", "caption": {caption}, "split": "train"}}\n' for i in range(3)))
    with pytest.raises(TaskError, match=rf"row 1 .*'caption' is {kind}, not text"):
        both(path)


def test_a_label_makes_another_task(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "image,caption,label\n" + "".join(f"{i}.jpg,a cat {i},{'no' if i % 2 else 'yes'}\n" for i in range(9))
    )
    assert load_task(str(path), text="image", paired=Paired("image", True)).spec.target == "class"
    pairs = load_task(str(path), text="image", paired=Paired("image", True), targets=("pair",))
    assert pairs.spec.target == "pair"
