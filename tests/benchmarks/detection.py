"""Detection from cached features: RetinaNet and Cascade Mask R-CNN overfit the 80 training images of the COCO subset,
on a frozen MobileNetV2. What is scored is the training images themselves: the heads must be able to learn what they
read.

Everything runs through the public commands' functions; images have a shorter side of 256.

    python -m tests.benchmarks.detection --data ../shared/data --out /tmp/coco --heads retinanet --epochs 60
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from pipeline.commands.extract import run_extract
from pipeline.commands.train import run_train
from pipeline.recipe import Recipe
from pipeline.runs import load_run
from tests.benchmarks.results import markdown, write

NOTE = """Frozen MobileNetV2 × 0.35 with ImageNet features; the first {images} of the 80 training images of the COCO
subset (80 classes; {short} pixels on the shorter side, at most {long} on the longer), trained on and scored: what a
head can learn by heart of the maps that it is given, not what it would find elsewhere. Heads of width {width}
(published: 256), batch 2, AdamW, cosine schedule. Seconds an epoch are of training alone, from the store, on {threads}
CPU thread(s) of a shared machine."""


def first_images(file: Path, count: int, folder: Path) -> Path:
    """COCO's JSON of the first `count` images of `file`, in `folder`."""
    raw = json.loads(file.read_text())
    raw["images"] = raw["images"][:count]
    kept = {image["id"] for image in raw["images"]}
    raw["annotations"] = [entry for entry in raw["annotations"] if entry["image_id"] in kept]
    made = folder / f"first-{count}_train2017.json"
    made.write_text(json.dumps(raw))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--heads", nargs="+", default=["retinanet", "cascade-mask-rcnn"])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--short", type=int, default=256)
    parser.add_argument("--long", type=int, default=427)
    parser.add_argument("--epochs", type=int, nargs="+", default=[60, 24], help="one for all heads, or one each")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--proposals", type=int, default=128, help="sampled of an image, of heads with proposals")
    parser.add_argument("--box-head", default="fc", choices=("fc", "conv"), help="of a cascade")
    parser.add_argument("--images", type=int, default=80, help="the first so many of the training images")
    args = parser.parse_args()
    coco = args.data / "coco"
    args.out.mkdir(parents=True, exist_ok=True)
    common = {
        "model": str(args.data / "weights/mobilenetv2_035"),
        "task": str(first_images(coco / "annotations/instances_train2017.json", args.images, args.out)),
        "validation": str(coco / "annotations/instances_val2017.json"),
        "data": str(coco),
        "store": str(args.out / f"store-{args.short}-{args.images}"),
        "image_size": f"short:{args.short}:{args.long}",
    }
    # Without validation rows the last epoch is the one that counts.
    done = run_extract(Recipe(**common, tuners=("fixed",), split=("train",)), print, quiet=True)
    print(f"extracted {done['computed']} images, {done['bytes'] / 1e6:.0f} MB, {done['seconds']:.1f} s")
    for head, epochs in zip(args.heads, args.epochs * len(args.heads), strict=False):
        options = {"head": head, "head_width": args.width}
        if head != "retinanet":
            options["proposals"] = args.proposals
        if "cascade" in head:
            options["box_head"] = args.box_head
        kind = "instances" if "mask" in head else "detection"
        recipe = Recipe(
            **common, tuner="fixed", objective=kind, objective_options=options, epochs=epochs, lr=args.lr,
            schedule="cosine", out=str(args.out / "runs" / head), overwrite=True,
        )  # fmt: skip
        found = run_train(recipe, lambda text: None, quiet=True)
        figures = load_run(args.out / "runs" / head).evaluate("train")
        shown = ("box_ap50", "box_map", "mask_ap50", "mask_map")
        cells = [f"{100 * figures[name]:.1f}" if name in figures else "–" for name in shown]
        row = (head, f"{found['trainable_parameters']:,}", epochs, *cells, f"{found['seconds_per_epoch']:.1f}")
        print(*row, flush=True)
        note = NOTE.format(
            images=args.images, width=args.width, threads=torch.get_num_threads(), short=args.short, long=args.long
        )
        command = f"python -m tests.benchmarks.detection --data DATA --out FOLDER --heads {head} --epochs {epochs}"
        command += "" if args.images == 80 else f" --images {args.images}"
        command += f" --width {args.width} --lr {args.lr:g}"
        command += "" if head == "retinanet" else f" --proposals {args.proposals}"
        command += f" --box-head {args.box_head}" if "cascade" in head else ""
        columns = ("head", "parameters", "epochs", "box AP50", "box AP", "mask AP50", "mask AP", "s/epoch")
        write(f"Detection, {head}, {args.images} images", command, f"{note}\n\n{markdown(columns, [row])}")


if __name__ == "__main__":
    main()
