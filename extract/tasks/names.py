"""What tasks of the user's own are called."""

from __future__ import annotations

import re

from pipeline.extract.tasks.glue import GLUE


def table_name(stem: str) -> str:
    """What a table is called as a task: its file's stem in letters, digits, - and _; never the name of a GLUE task."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_") or "table"
    return f"{name}-table" if name in GLUE else name
