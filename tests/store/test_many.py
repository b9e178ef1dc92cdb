"""The benchmark of many samples runs, beside an earlier checkout too, whose figures are kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def rows(folder: Path, *more: str) -> list[list[str]]:
    shape = ["--samples", "300", "--segments", "3", "--steps", "index,verify sizes", "--folder", str(folder)]
    command = [sys.executable, "-m", "tests.benchmarks.scale", *shape, *more]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]


def test_many_samples_beside_an_earlier_checkout(tmp_path: Path) -> None:
    head, _, index, verify = rows(tmp_path, "--before", sys.executable)
    assert head[:5] == ["samples", "segments", "step", "cpu s, before", "cpu s, now"]
    assert (index[:3], verify[:3]) == (["300", "3", "index"], ["300", "3", "verify sizes"])
    assert [len(list(map(float, row[3:]))) for row in (index, verify)] == [6, 6]  # none of them ended otherwise
    kept = tmp_path / "before" / "300-3.json"
    known = json.loads(kept.read_text())
    assert known["index"]["bytes"] == 24
    known["index"]["cpu"] = 7.0
    kept.write_text(json.dumps(known))
    assert rows(tmp_path, "--before", sys.executable, "--only-before")[2][3] == "7.00"


def test_a_step_beyond_its_bounds_is_told(tmp_path: Path) -> None:
    assert rows(tmp_path, "--limit", "0.01")[2][3:] == ["over 0.01 s"] * 3
