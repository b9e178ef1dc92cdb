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
from typing import Any

import torch

from pipeline.commands.extract import run_extract
from pipeline.commands.train import run_train
from pipeline.recipe import Recipe, read_recipe
from pipeline.runs import load_run
from pipeline.train.fit.optimizer import adamw
from pipeline.train.fit.options import FitOptions
from tests.benchmarks.results import markdown, write

NOTE = """Frozen MobileNetV2 × 0.35 with ImageNet features; the first {images} of the 80 training images of the COCO
subset (80 classes; {short} pixels on the shorter side, at most {long} on the longer), trained on and scored: what a
head can learn by heart of the maps that it is given, not what it would find elsewhere. Heads of width {width}
(published: 256), batch 2, AdamW, cosine schedule. Seconds an epoch are of training alone, from the store, on {threads}
CPU thread(s) of a shared machine."""


SHOWN = {
    "box_ap50": "box AP50", "box_map": "box AP", "box_map_small": "small", "box_map_medium": "medium",
    "box_map_large": "large", "mask_ap50": "mask AP50", "mask_map": "mask AP",
}  # fmt: skip
ELSEWHERE = ("store", "data", "validation", "out", "overwrite")  # where something lies


def first_images(file: Path, count: int, folder: Path) -> Path:
    """COCO's JSON of the first `count` images of `file`, in `folder`."""
    raw = json.loads(file.read_text())
    raw["images"] = raw["images"][:count]
    kept = {image["id"] for image in raw["images"]}
    raw["annotations"] = [entry for entry in raw["annotations"] if entry["image_id"] in kept]
    made = folder / f"first-{count}_train2017.json"
    made.write_text(json.dumps(raw))
    return made


def finished(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The metrics of the run in `folder`, None where none has ended. SystemExit where it was trained otherwise than
    `recipe` says: its weights would stand below settings that are not theirs."""
    if not (folder / "metrics.json").is_file():
        return None
    kept, asked, plain = read_recipe(folder / "recipe.yaml", record=True), recipe.to_mapping(), Recipe().to_mapping()
    own = {name: value for name, value in asked.items() if value != plain[name] and name not in ELSEWHERE}
    options = own.pop("objective_options", {})
    pairs = [(name, kept.get(name), value) for name, value in own.items()]
    pairs += [(name, kept["objective_options"].get(name), value) for name, value in options.items()]
    if other := [f"{name} {was}, not {now}" for name, was, now in pairs if was != now]:
        raise SystemExit(f"{folder} holds a run of {', '.join(other)}: give its settings, or another --out")
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return found


def further(folder: Path, epochs: int, rate: float) -> dict[str, float]:
    """The figures on the training images after `epochs` more from a finished run's weights, from `rate` down to 0 in a
    cosine, as `pipeline train` clips and decays."""
    run, options = load_run(folder), FitOptions(lr=rate)
    source, model = run.job.source("train"), run.model.train()
    optimizer, _ = adamw(model, options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(source))
    for batch in source.epochs(0, epochs):
        optimizer.zero_grad(set_to_none=True)
        model.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip or float("inf"))
        optimizer.step()
        schedule.step()
    return run.evaluate("train")


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
    parser.add_argument(
        "--further", type=int, default=0, help="epochs more from the weights of the run, in a row below"
    )
    parser.add_argument("--further-lr", type=float, default=3e-4)
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
        folder = args.out / "runs" / head
        # With --further a finished run is not trained anew.
        found = (finished(folder, recipe) if args.further else None) or run_train(recipe, lambda _: None, quiet=True)
        more = f"{epochs} + {args.further} at {args.further_lr:g}"
        figures = {str(epochs): load_run(folder).evaluate("train")}
        if args.further:
            figures[more] = further(folder, args.further, args.further_lr)
        rows = []
        for trained, each in figures.items():
            cells = [f"{100 * each[name]:.1f}" if name in each else "–" for name in SHOWN]
            seconds = f"{found['seconds_per_epoch']:.1f}" if trained != more else ""
            rows.append((head, f"{found['trainable_parameters']:,}", trained, *cells, seconds))
            print(*rows[-1], flush=True)
        note = NOTE.format(
            images=args.images, width=args.width, threads=torch.get_num_threads(), short=args.short, long=args.long
        )
        command = f"python -m tests.benchmarks.detection --data DATA --out FOLDER --heads {head} --epochs {epochs}"
        command += "" if args.images == 80 else f" --images {args.images}"
        command += f" --width {args.width} --lr {args.lr:g}"
        command += "" if head == "retinanet" else f" --proposals {args.proposals}"
        command += f" --box-head {args.box_head}" if "cascade" in head else ""
        command += f" --further {args.further} --further-lr {args.further_lr:g}" if args.further else ""
        columns = ("head", "parameters", "epochs", *SHOWN.values(), "s/epoch")
        write(f"Detection, {head}, {args.images} images", command, f"{note}\n\n{markdown(columns, rows)}")


if __name__ == "__main__":
    main()
