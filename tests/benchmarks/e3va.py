"""E³VA, + and ++ with UPerNet on CamVid, beside the frozen pyramid, an adapter, LoRA and full fine-tuning.

No pretrained Swin is at hand: a small one is trained here on CIFAR-10 images first, for minutes. Runs go through the
public commands' functions.

    python -m tests.benchmarks.e3va --data ../shared/data --out FOLDER --seeds 3
    python -m tests.benchmarks.e3va --data ../shared/data --out FOLDER --seeds 1 --methods fixed e3va --epochs 2
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from pipeline.commands.compare import fit_baseline, step_memory
from pipeline.commands.extract import run_extract
from pipeline.commands.train import run_train
from pipeline.jobs.job import load_job
from pipeline.jobs.sources import live_backbone, sources
from pipeline.recipe import Recipe
from pipeline.train.baselines.methods import BASELINES, input_source
from pipeline.train.evaluate import evaluate
from pipeline.train.fit.optimizer import adamw
from pipeline.train.fit.options import FitOptions
from tests.benchmarks.results import markdown, write

SHAPE = {"embed_dim": 32, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "window_size": 4, "img_size": 64}
NAME = "swin_tiny_patch4_window7_224"  # the architecture that SHAPE makes smaller
MEAN, STD = [0.47, 0.47, 0.47], [0.25, 0.25, 0.25]
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "fixed": ("fixed", {}),
    "E³VA": ("e3va", {"alpha": 8}),
    "E³VA+": ("e3va", {"alpha": 16}),
    "E³VA++": ("e3va", {"alpha": 32}),
    "E³VA, int8": ("e3va", {"alpha": 8}),
    "adapter (live)": ("adapter", {}),
    "lora (live)": ("lora", {}),
    "full (live)": ("full", {}),
}
RATE, FULL_RATE = 3e-3, 1e-3  # of `pipeline train` for a head alone; of full fine-tuning a smaller one
NOTE = """A Swin of width 32 with two blocks in each of its four stages ({parameters:,} parameters), trained here on
3,500 CIFAR-10 images at 64 × 64 for {pretrain} epochs (flips, shifts of up to 8 pixels; {accuracy:.0f} % of the other
500 are right), reads CamVid stretched to {size}; UPerNet of width 64 with its auxiliary head, batch {batch}, {epochs}
epochs, float32. Test mIoU over {seeds} seeds, mean ± standard deviation, at the epoch that was best on validation.
Trainable parameters without the head's {head:,}. Memory of one training step: weights, gradients, Adam's moments, the
batch and what the backward pass keeps, counted from tensors. Batches a second of processor time, one thread: in
training from the store, but with the backbone for what is live; in test with the backbone run on images, whatever the
method."""


def cifar(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (4000, 3, 32, 32) in 0..1 and labels."""
    sheets = [np.asarray(Image.open(folder / f"cifar10_batch_{i}.png").convert("RGB")) for i in range(4)]
    pixels = torch.from_numpy(np.concatenate(sheets).reshape(4000, 32, 32, 3)).permute(0, 3, 1, 2).float() / 255
    return pixels, torch.tensor(json.loads((folder / "labels.json").read_text(encoding="utf-8")))


def pretrained(data: Path, folder: Path, epochs: int) -> float:
    """Train the small Swin on CIFAR images and save it to `folder` as timm does. Returns the accuracy on images that it
    was not trained on, in percent."""
    if (folder / "accuracy.json").is_file():
        return float(json.loads((folder / "accuracy.json").read_text()))
    torch.manual_seed(0)
    model = timm.create_model(NAME, pretrained=False, num_classes=10, drop_path_rate=0.05, **SHAPE)
    images, labels = cifar(data / "cifar10")
    images = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    images = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * (3500 // 50)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.2)
    for _ in range(epochs):
        for picks in torch.randperm(3500)[: 3500 // 50 * 50].split(50):
            batch = images[picks]
            batch = batch.flip(3) if torch.rand(()) < 0.5 else batch
            shift = torch.randint(-8, 9, (2,)).tolist()
            loss = F.cross_entropy(model(batch.roll(shift, (2, 3))), labels[picks], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    with torch.inference_mode():
        told = model.eval()(images[3500:]).argmax(1)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    about = {"input_size": [3, 64, 64], "mean": MEAN, "std": STD, "interpolation": "bilinear"}
    config = {"architecture": NAME, "num_classes": 10, "num_features": 256, "model_args": SHAPE}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": about}))
    accuracy = 100 * float((told == labels[3500:]).float().mean())
    (folder / "accuracy.json").write_text(json.dumps(accuracy))
    return accuracy


def per_second(run: Callable[[], Iterator[Any]]) -> float:
    """Batches a second of processor time."""
    began = time.process_time()
    count = sum(1 for _ in run())
    return count / (time.process_time() - began)


def speeds(model: Any, train: Any, test: Any, scorer: Any, batches: int = 20) -> tuple[float, float]:
    """(training, test) batches a second; both sources are read before, so that nothing is read for the first time."""
    optimizer, _ = adamw(model, FitOptions(lr=1e-6))

    def training() -> Iterator[Any]:
        for number, batch in enumerate(train.epochs(0, 1)):
            if number == batches:
                return
            optimizer.zero_grad(set_to_none=True)
            model.loss(batch).backward()
            optimizer.step()
            yield batch

    model.train()
    per_second(training)
    found = per_second(training)
    began = time.process_time()
    evaluate(model, test, scorer)
    return found, len(test) / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--pretrain", type=int, default=20, help="epochs on CIFAR images")
    parser.add_argument("--size", default="96x128")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--no-write", action="store_true", help="leave RESULTS.md as it is")
    args = parser.parse_args()
    accuracy = pretrained(args.data, args.out / "swin", args.pretrain)
    print(f"Swin: {accuracy:.1f} % of CIFAR images", flush=True)
    task = {"model": str(args.out / "swin"), "task": str(args.data / "camvid"), "objective": "segmentation"}
    task |= {"image_size": args.size, "store": str(args.out / f"store-{args.size}")}
    sizes = {}
    for fmt in ("float16", "int8"):
        made = run_extract(Recipe(**task, format=fmt, tuners=("fixed", "e3va")), print, quiet=True)
        file = args.out / f"bytes-{args.size}-{fmt}.json"
        if made["computed"]:
            file.write_text(json.dumps(made["bytes"]))
        sizes[fmt] = json.loads(file.read_text())
        print(f"{fmt}: {made['computed']} images, {sizes[fmt] / 1e6:.0f} MB", flush=True)
    rows = []
    for name in args.methods:
        method, options = METHODS[name]
        common = {**task, "format": "int8" if "int8" in name else "float16", "epochs": args.epochs}
        common |= {"objective_options": {"head_width": 64}, "batch_size": args.batch}
        kept = args.out / f"rows/{args.size}-{args.epochs}-{args.batch}-{args.seeds}-{name.replace(' ', '-')}.json"
        if not kept.is_file():  # a command that was stopped goes on where it was
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(json.dumps(row(name, method, options, common, args)))
        cells, head_size = json.loads(kept.read_text())
        rows.append(cells)
        print(*cells, flush=True)
    head = ("method", "trainable", "lr", "validation", "test mIoU", "by seed", "memory", "training", "test")
    total = sum(p.numel() for p in timm.create_model(NAME, num_classes=0, **SHAPE).parameters())
    extracted = ", ".join(f"{fmt} {size / 1e6:.0f} MB" for fmt, size in sizes.items())
    note = NOTE.format(
        parameters=total, pretrain=args.pretrain, accuracy=accuracy, size=args.size.replace("x", " × "),
        epochs=args.epochs, seeds=args.seeds, head=head_size, batch=args.batch,
    )  # fmt: skip
    if not args.no_write:
        said = f"--size {args.size} --batch {args.batch} --epochs {args.epochs} --pretrain {args.pretrain}"
        said += f" --seeds {args.seeds} --methods {' '.join(repr(name) for name in args.methods)}"
        command = f"python -m tests.benchmarks.e3va --data DATA --out FOLDER {said}"
        write("E³VA on masks", command, f"{note} The store: {extracted}.\n\n{markdown(head, rows)}")


def row(
    name: str, method: str, options: dict[str, Any], common: dict[str, Any], args: Any
) -> tuple[tuple[str, ...], int]:
    """A line of the table, and the trainable parameters of the head."""
    live = method in BASELINES

    def run(rate: float, seed: int) -> tuple[dict[str, Any], Any]:
        out = str(args.out / f"runs/{args.size}/{name.replace(' ', '-')}-{rate:g}-{seed}")
        recipe = Recipe(**common, tuner="fixed" if live else method, tuner_options=options, lr=rate, seed=seed, out=out,
                        overwrite=True)  # fmt: skip
        if live:
            made = fit_baseline(recipe, method, "ours")
            return made.metrics, made
        return run_train(recipe, lambda text: None, quiet=True), recipe

    rate = FULL_RATE if method == "full" else RATE
    runs = [run(rate, seed) for seed in range(args.seeds)]
    first = runs[0][1]
    job = first.job if live else load_job(first)
    model, train = (first.model, first.train) if live else (job.model(0), sources(job, None)["train"])
    test = sources(job, *live_backbone(job))["test"]
    batch = next(iter(train.epochs(0, 1)))
    memory = step_memory(model, batch, [] if live else [model.tuner.tail])
    training, testing = speeds(model, train, input_source(test, test.live) if live else test, job.objective.scorer())
    trained = runs[0][0]["trainable_parameters"]
    head = sum(p.numel() for p in model.head.parameters())
    scores = [100 * found["test"]["miou"] for found, _ in runs]
    spread = f" ± {np.std(scores, ddof=1):.1f}" if len(scores) > 1 else ""
    cells = (
        name, f"{trained - head:,}", f"{rate:g}", f"{100 * np.mean([r['validation']['miou'] for r, _ in runs]):.1f}",
        f"{np.mean(scores):.1f}{spread}", ", ".join(f"{s:.1f}" for s in scores), f"{memory / 1e6:.0f} MB",
        f"{training:.1f}", f"{testing:.1f}",
    )  # fmt: skip
    return cells, head


if __name__ == "__main__":
    main()
