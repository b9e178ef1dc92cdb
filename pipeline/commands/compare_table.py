"""The table of `pipeline compare`, and what its rows were made with, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pipeline.terminal import size_text, table_text
from pipeline.train.fit.loop import FitOptions
from pipeline.train.metrics import is_share, smaller_is_better

HEAD = ("method", "trainable", "share", "memory", "s/epoch", "metric", "spread", "seeds")


def compared_text(rows: Sequence[dict[str, Any]], preset: str, total: int) -> str:
    """The table as a person reads it, with what it was made with. `total`: parameters of the backbone."""
    cells = [
        (
            r["method"] + (" (live)" if r["live"] else ""),
            f"{r['trainable']:,}",
            f"{100 * r['share']:.2f} %",
            size_text(r["memory_bytes"]),
            f"{r['seconds_per_epoch']:.2f}",
            _figure(r["metric"], r["figure"]),
            "" if r["spread"] is None else f"± {_figure(r['spread'], r['figure'])}",
            str(r["seeds"]),
        )
        for r in rows
    ]
    figures = list(dict.fromkeys(r["figure"] for r in rows))
    layouts = {r["method"]: r["layout"] for r in rows}
    same = set(layouts.values())
    laid = same.pop() if len(same) == 1 else "; ".join(f"{method} {layout}" for method, layout in layouts.items())
    made = [f"  {r['method']}: {r['settings']}" for r in rows]
    shown = [f"{n}, smaller is better" if smaller_is_better(n) else n for n in figures if n != "average"]
    lines = [
        table_text(HEAD, cells),
        f"share: trainable parameters but those of the task's head, of the {total:,} of the backbone",
        *(f"metric: {name}" for name in shown),
        f"layout of the samples: {laid}",
        "",
    ]
    return "\n".join([*lines, f"settings, baselines by --preset {preset}:", *made])


def _figure(value: float | None, name: str) -> str:
    """Shares in percent; errors in the target's unit, or nats; figures of retrieval as they are."""
    if value is None or math.isnan(value):
        return "undefined"
    return f"{100 * value:.1f}" if is_share(name) else f"{value:.4g}"


def settings(what: str, options: FitOptions, batch_size: int) -> str:
    """What a row of the table was made with, in words: the method's own settings and those of training."""
    warm = f"{options.warmup_steps} steps" if options.warmup_ratio is None else f"{options.warmup_ratio:g} of all steps"
    long = f"{options.epochs} epochs" if options.max_steps is None else f"{options.max_steps} steps"
    size = f"{batch_size}" + (f" × {options.accumulate}" if options.accumulate > 1 else "")
    return (
        f"{what}; lr {options.lr:g}, {options.schedule} after a warm-up of {warm}, batch {size}, {long}, "
        f"clip {options.clip:g}, weight decay {options.weight_decay:g}, {options.precision}"
    )
