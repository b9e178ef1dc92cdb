"""`RESULTS.md`: one section a command, replaced when the command is run again."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

PAGE = Path(__file__).parent / "RESULTS.md"
HEAD = """# Measured results

Every section is written by the command in its first line, with the machine, the date and the versions it ran on; run
it again and the section is replaced. Ratios are taken within one run. What we lose is shown as well.
"""


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, the first column to the left."""
    ruler = [":--", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(str(c) for c in row) + " |" for row in [head, ruler, *rows])


def machine() -> str:
    """The machine and versions in one line; no names of hosts or folders."""
    cpu = platform.processor() or platform.machine()
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        names = {line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")}
        cpu = f"{', '.join(sorted(names)) or cpu}, {info.count('processor	:')} cores"
    except OSError:
        pass
    if torch.cuda.is_available():
        cpu += f", {torch.cuda.get_device_name(0)}"
    names = ("torch", "transformers", "zarr", "dask", "numpy")
    return f"{time.strftime('%Y-%m-%d')}; {cpu}; Python {platform.python_version()}, " + ", ".join(
        f"{n} {version(n)}" for n in names
    )


def write(title: str, command: str, body: str, page: Path = PAGE) -> None:
    """Put the section `title` into the page, in place of an older one of the same title."""
    section = f"## {title}\n\n`{command}`  \n{machine()}\n\n{body.strip()}\n"
    text = page.read_text(encoding="utf-8") if page.exists() else HEAD
    old = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if old.search(text):
        text = old.sub(lambda _: section + "\n", text, count=1)
    else:
        text = text.rstrip() + "\n\n" + section
    page.write_text(text.rstrip() + "\n", encoding="utf-8")
