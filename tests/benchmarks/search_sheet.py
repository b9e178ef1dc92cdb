"""The picture in docs/retrieval.md: what `pipeline search` finds for a few texts, as one sheet of small images.

    python -m tests.benchmarks.search_sheet --run RUN --images FOLDER --picture docs/images/search.jpg

RUN: one of `tests.benchmarks.retrieval`, say `DIR/fold0-pooled`; of its images those of `--split` are searched, by
default of test, which training has not seen.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

import pipeline
from pipeline.commands.search import Query, run_search

QUERIES = ("a dog runs on the beach", "a dog in the snow", "two dogs run on the grass")
TOP, SIZE, GAP, ASIDE, UNDER = 4, (144, 108), 6, 132, 16  # images a query; pixels: of one, between, for words


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="the folder of the run's images")
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("queries", nargs="*", default=QUERIES)
    args = parser.parse_args()
    run = pipeline.load_run(args.run, device="cpu")
    found = [run_search(run, Query(text), TOP, [args.split], print) for text in args.queries]
    for told in found:
        names = "  ".join(f"{r['image']} {r['similarity']:.2f}" for r in told["results"])
        print(f"{told['query']} (among {told['among']}): {names}")
    sheet(found, args.images).save(args.picture, quality=82)
    print(f"{args.picture}: {args.picture.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
