"""Learning-rate range test (Smith, 2017): one short run in which the rate rises, and where its loss fell fastest."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SMOOTH = 0.9  # of the loss, a step


def points(run: str | Path) -> list[tuple[float, float]]:
    """(learning rate, loss) of each step in the log of `run`, to where its loss is no number any more."""
    found = []
    file = Path(run) / "log.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        entry = json.loads(line)
        if entry.get("loss") is not None and entry["lr"] > 0:
            found.append((float(entry["lr"]), float(entry["loss"])))
    return found


def reading(found: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    """`steepest`: the rate at which the smoothed loss falls fastest as the rate is multiplied; `lowest`: where it is
    least, which is already too large to train with. None of fewer than ten steps, or where it never falls."""
    if len(found) < 10:
        return None
    mean, smooth = 0.0, []
    for step, (_, loss) in enumerate(found, start=1):
        mean = SMOOTH * mean + (1 - SMOOTH) * loss
        smooth.append(mean / (1 - SMOOTH**step))
    lowest = min(range(len(smooth)), key=smooth.__getitem__)
    rates = [math.log(rate) for rate, _ in found]
    slopes = [(smooth[i + 1] - smooth[i - 1]) / (rates[i + 1] - rates[i - 1]) for i in range(1, lowest)]
    if not slopes or min(slopes) >= 0:
        return None
    return {"steepest": found[1 + slopes.index(min(slopes))][0], "lowest": found[lowest][0]}


def told(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float] | None]:
    """Setting → what its runs say, the geometric mean over seeds."""
    out: dict[str, dict[str, float] | None] = {}
    for label in dict.fromkeys(row["label"] for row in rows):
        known = [r for row in rows if row["label"] == label and (r := reading(points(row["run"]))) is not None]
        names = ("steepest", "lowest")
        means = {n: math.exp(sum(math.log(r[n]) for r in known) / len(known)) for n in names} if known else None
        out[label] = means
    return out


def told_text(found: Mapping[str, Mapping[str, float] | None]) -> str:
    """A line a setting."""
    lines = ["learning-rate range test: the loss falls fastest at, and is least at"]
    for label, rates in found.items():
        said = (
            "no fall seen: give more --epochs" if rates is None else f"{rates['steepest']:.2g}, {rates['lowest']:.2g}"
        )
        lines.append(f"  {label}: {said}")
    return "\n".join(lines)
