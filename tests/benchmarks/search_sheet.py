"""The picture in docs/retrieval.md: what `pipeline search` finds for a few texts, as one sheet of small images.

    python -m tests.benchmarks.search_sheet --data ../shared/data --work DIR --picture docs/images/search.jpg

Linear maps of MobileNetV2 and MiniLM are trained on Flickr8k's photographs and captions; what is searched are those of
the COCO subset that may be shown by their licence (CC BY, CC BY-SA), which training has not seen. The credits that are
owed are printed.
"""

from __future__ import annotations

import argparse
import csv
import json
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

import pipeline
from pipeline.commands.search import Query, run_search
from tests.benchmarks.retrieval import POOLED, tables
from tests.benchmarks.retrieval import pipeline as command

QUERIES = ("a boy does a trick on his skateboard", "horses on the beach", "a plate of food")
TOP, SIZE, GAP, ASIDE, UNDER = 4, (144, 108), 6, 132, 16  # images a query; pixels: of one, between, for words
SHOWN = {4: "CC BY 2.0", 5: "CC BY-SA 2.0"}  # COCO's numbers of the licences


def sheet(found: list[dict[str, Any]], images: Path) -> Image.Image:
    """A row a query: its words, then the images it found with their similarity, best first."""
    high = SIZE[1] + UNDER + GAP
    whole = Image.new("RGB", (ASIDE + TOP * (SIZE[0] + GAP), len(found) * high), "white")
    draw, large, small = ImageDraw.Draw(whole), ImageFont.load_default(15), ImageFont.load_default(11)
    for row, told in enumerate(found):
        top = row * high
        words = "\n".join(textwrap.wrap(f"“{told['query']}”", 15))
        draw.multiline_text((GAP, top + SIZE[1] // 2), words, "black", large, anchor="lm")
        for place, result in enumerate(told["results"]):
            left = ASIDE + place * (SIZE[0] + GAP)
            with Image.open(images / result["image"]) as image:
                whole.paste(ImageOps.fit(image.convert("RGB"), SIZE, Image.Resampling.LANCZOS), (left, top))
            draw.text((left, top + SIZE[1] + 1), f"{result['similarity']:.2f}", "dimgrey", small)
    return whole


def photographs(coco: Path) -> list[dict[str, Any]]:
    """The images of the subset that may be shown: `image` below the data, `captions`, `licence`, `url`."""
    found = []
    for split in ("train2017", "val2017"):
        raw = json.loads((coco / f"annotations/captions_{split}.json").read_text(encoding="utf-8"))
        for entry in raw["images"]:
            if entry["license"] in SHOWN:
                own = [a["caption"] for a in raw["annotations"] if a["image_id"] == entry["id"]]
                name, licence = f"coco/{split}/{entry['file_name']}", SHOWN[entry["license"]]
                found.append({"image": name, "captions": own, "licence": licence, "url": entry["flickr_url"]})
    return found


def trained(data: Path, work: Path, shown: list[dict[str, Any]], epochs: int) -> Path:
    """The folder of a run on Flickr8k, whose test images are `shown`."""
    with (data / "flickr8k/captions.csv").open(newline="", encoding="utf-8") as file:
        rows = [{**row, "image": f"flickr8k/images/{row['image']}"} for row in csv.DictReader(file)]
    names = sorted({row["image"] for row in rows})
    rows += [{"image": photo["image"], "caption": text} for photo in shown for text in photo["captions"]]
    parts = {"train": set(names[100:]), "validation": set(names[:100]), "test": {photo["image"] for photo in shown}}
    task = [*tables(rows, parts, work / "tables"), "--image", "image", "--text", "caption", "--data", data]
    own = ["--model", f"image={data}/weights/mobilenetv2_035,text=minilm", *task, "--store", work / "store"]
    command("extract", *own, "--for", "probe")
    how = ["--objective", "hinge", "--epochs", epochs, "--batch-size", 128, "--lr", 1e-3, "--device", "cpu"]
    command("train", *own, *POOLED, *how, "--out", work / "run", "--overwrite")
    return work / "run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for tables, store and run")
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("queries", nargs="*", default=QUERIES)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    shown = photographs(args.data / "coco")
    run = pipeline.load_run(trained(args.data.resolve(), args.work, shown, args.epochs), device="cpu")
    found = [run_search(run, Query(text), TOP, ["test"], print) for text in args.queries]
    owed = {photo["image"]: f"{photo['licence']}  {photo['url']}" for photo in shown}
    for told in found:
        print(f"{told['query']} (among {told['among']})")
        for result in told["results"]:
            print(f"  {result['similarity']:.2f}  {result['image']}  {owed[result['image']]}")
    sheet(found, args.data).save(args.picture, quality=82)
    print(f"{args.picture}: {args.picture.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
