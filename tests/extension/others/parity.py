"""A task: is the number of words in a made-up sentence even?"""

from __future__ import annotations

import random
from pathlib import Path

from pipeline.extract.tasks.base import Rows, Task, TaskSpec
from pipeline.extract.tasks.registry import register_task

WORDS = ("the", "old", "cat", "sees", "a", "red", "house")


def load(data: Path | None, grid: float) -> Task:
    """`data` and `grid` play no part."""
    drawn, splits = random.Random(0), {}
    for split, n in (("train", 24), ("validation", 8), ("test", 8)):
        lengths = [drawn.randint(2, 9) for _ in range(n)]
        texts = [(" ".join(drawn.choices(WORDS, k=k)) + f" {split} {i}",) for i, k in enumerate(lengths)]
        splits[split] = Rows(texts, [k % 2 for k in lengths])
    labels = ("even", "odd")
    spec = TaskSpec("word-parity", "class", labels, ("accuracy",), ("sentence",), "{0}", labels)
    return Task(spec, splits, {"source": "made up"})


register_task("word-parity", "even or odd numbers of words", load)
