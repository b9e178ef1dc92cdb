"""The table of a sweep: its runs, its settings over their seeds, and how these differ."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.store.errors import UserError
from pipeline.terminal import table_text
from pipeline.train.fit.log import write_bytes
from pipeline.train.metrics import ERRORS

SWEEP = "sweep.json"


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`runs`: the rows as they are. `settings`: one a label, with means and standard deviations over the seeds that
    have ended well. `best`: the setting with the best mean on dev, over all of its seeds: the largest, of an error the
    smallest. `differences`: of each other setting from the best one, paired by seed."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    settings = [_setting(label, [row for row in rows if row["label"] == label]) for label in labels]
    figure = rows[0]["figure"]
    # Of a seed that diverged, too; and what was stopped as a loser is none of those compared to the end.
    lacking = {row["label"] for row in rows if row["dev"] is None or row.get("stopped") == "halving"}
    whole = [s for s in settings if s["label"] not in lacking]
    best = max(whole, key=lambda s: _value(s, figure)) if whole else None
    result: dict[str, Any] = {
        "figure": figure,
        "runs": list(rows),
        "settings": settings,
        "best": best,
        "differences": [],
    }
    if best is not None:
        chosen = [row for row in rows if row["label"] == best["label"]]
        result["best"] = {**best, "run": max(chosen, key=lambda row: _value(row, figure))["run"]}
        for label in labels:
            others = [row for row in rows if row["label"] == label]
            if label != best["label"]:
                result["differences"].append({"label": label, **difference(chosen, others)})
    return result


def _value(row: Mapping[str, Any], figure: str) -> float:
    """What is larger of the better row: its dev, of an error with the sign turned; without one the least."""
    return -math.inf if row["dev"] is None else -row["dev"] if figure in ERRORS else row["dev"]


def _setting(label: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ended = [row for row in rows if row["status"] == "done"]
    out: dict[str, Any] = {"label": label, "setting": rows[0]["setting"], "seeds": len(rows), "ended": len(ended)}
    for name in ("dev", "score"):
        values = [row[name] for row in ended if row[name] is not None]
        out[name] = statistics.mean(values) if values else None
        out[f"{name}_spread"] = statistics.stdev(values) if len(values) > 1 else None
    for name in ("trainable_parameters", "seconds_per_epoch"):
        out[name] = min((row[name] for row in ended if row[name] is not None), default=None)
    return out


def _pair(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """What two runs have in common whose difference says most: the draw of their weights, and their rows."""
    return row["seed"], row.get("fold")


def difference(best: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Other − best over the seeds that both have: the `mean` of the differences and its standard error, their standard
    deviation over √n (None with fewer than two), for dev and for the test score."""
    out: dict[str, Any] = {}
    for name in ("dev", "score"):
        theirs = {_pair(row): row[name] for row in best if row[name] is not None}
        pairs = [row[name] - theirs[_pair(row)] for row in other if row[name] is not None and _pair(row) in theirs]
        error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
        out[name] = {"mean": statistics.mean(pairs) if pairs else None, "error": error, "seeds": len(pairs)}
    return out


def _shown(figure: str, value: float | None, signed: bool = False) -> str:
    """A share in percent, an error as it is."""
    sign = "+" if signed else ""
    return "" if value is None else f"{value:{sign}.4g}" if figure in ERRORS else f"{100 * value:{sign}z.1f}"


def summary_text(result: Mapping[str, Any]) -> str:
    """The settings as a table, the best one, and the command that repeats each run alone."""
    figure = result["figure"]
    differences = {d["label"]: d for d in result["differences"]}
    head = ("setting", "trainable", "dev", "±", "test", "±", "seeds", "test − best", "s.e.")
    cells = []
    for s in sorted(result["settings"], key=lambda s: _value(s, figure), reverse=True):
        apart = differences.get(s["label"], {}).get("score", {"mean": None, "error": None})
        lost = "" if s["ended"] == s["seeds"] else f" of {s['seeds']}"
        told = (s["dev"], s["dev_spread"], s["score"], s["score_spread"])
        cells.append(
            (
                s["label"], f"{s['trainable_parameters']:,}" if s["trainable_parameters"] else "",
                *(_shown(figure, value) for value in told), f"{s['ended']}{lost}",
                _shown(figure, apart["mean"], True), _shown(figure, apart["error"]),
            )
        )  # fmt: skip
    lines = [f"dev and test: {figure}" + (", smaller is better" if figure in ERRORS else ""), table_text(head, cells)]
    for row in result["runs"]:
        if row["status"] == "diverged":
            lines.append(f"{row['name']}: {row['why']}")
    if result["best"] is None:
        lines.append("no setting is the best: that is chosen on a validation split, over seeds that all ended well")
    else:
        lines.append(f"best by dev: {result['best']['label']}; its best run: {result['best']['run']}")
    stopped = [row["name"] for row in result["runs"] if row.get("stopped") == "halving"]
    if stopped:
        lines.append(f"stopped early, as losers: {len(stopped)} of {len(result['runs'])} runs")
    in_turn: dict[str, list[str]] = {}
    for row in result["runs"]:
        if row.get("in_turn"):
            in_turn.setdefault(row["in_turn"], []).append(row["name"])
    lines += [f"stepped in turn, not as one: {', '.join(names)} ({why})" for why, names in in_turn.items()]
    if again := result.get("refit"):
        score = _shown(figure, again["score"]) or "no test split"
        lines.append(f"refitted on training and validation rows: {again['run']}, test {score}")
    lines += ["", "each run alone:", *(f"  {row['command']}" for row in result["runs"])]
    return "\n".join(lines)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A row a run: the setting's options as columns, then the figures of validation and test."""
    options = list(dict.fromkeys(k for row in rows for k in row["setting"]))
    plain = ("dev", "score", "best_epoch", "steps", "trainable_parameters", "seconds", "seconds_per_epoch", "command")
    figures = {
        f"{split}_{name}": (split, name)
        for split in ("validation", "test") for row in rows for name in row[split] or ()
    }  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *options, "seed", "order_seed", "fold", "status", *figures, *plain])
    for row in rows:
        known = [(row[split] or {}).get(name) for split, name in figures.values()]
        told = [row["setting"].get(name) for name in options]
        writer.writerow([row["name"], *told, row["seed"], row["order_seed"], row["fold"], row["status"], *known,
                         *(row[name] for name in plain)])  # fmt: skip
    write_bytes(path, text.getvalue().encode())


def table_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of the sweep in `folder` by name; none where there is no sweep. UserError for a damaged table."""
    file = folder / SWEEP
    if not file.is_file():
        return {}
    try:
        return {row["name"]: row for row in json.loads(file.read_text(encoding="utf-8"))["runs"]}
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise UserError(f"{file} is no sweep's table: restore it, or give another --out") from None
