"""Progress that fits who reads it: a bar on a terminal, plain lines in a file, nothing where it is not wanted."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS = 30.0  # between two plain lines
shown = True  # the command line turns it off by --quiet


class Bar(tqdm):
    """tqdm's bar; where stderr is no terminal, a line of its own after each `SECONDS`, none for work that is over
    before."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self.plain = not sys.stderr.isatty()
        more["disable"] = bool(more.get("disable")) or not shown
        if self.plain:
            more |= {"mininterval": SECONDS, "ascii": True, "delay": 0}
        self.said = time.monotonic()
        super().__init__(*args, **more)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        if not self.plain:
            return super().display(msg, pos)
        if time.monotonic() - self.said >= SECONDS:
            self.said = time.monotonic()
            self.fp.write(f"{self.line()}\n")
            self.fp.flush()
        return False  # nothing is there to be wiped

    def clear(self, nolock: bool = False) -> None:
        if not self.plain:
            super().clear(nolock)

    def line(self) -> str:
        """ "extract: 1,200 of 9,000 samples (13 %), 210 a second, 37 s left; 0.12 GB sealed"."""
        elapsed, unit = self.format_dict["elapsed"], str(self.unit).strip()
        rate = self.n / elapsed if elapsed > 0 else 0.0
        name = f"{self.desc.rstrip(': ')}: " if self.desc else ""
        count = self._number(self.n)
        if self.total:
            count += f" of {self._number(self.total)}"
        if not self.unit_scale:
            count += f" {unit.rstrip('s')}s"
        if self.total:
            count += f" ({self.n / self.total:.0%})"
        left = f", {(self.total - self.n) / rate:,.0f} s left" if self.total and rate else ""
        more = f"; {self.postfix}" if self.postfix else ""
        return f"{name}{count}, {self._number(rate)} a second{left}{more}"

    def _number(self, n: float) -> str:
        if self.unit_scale:
            return f"{self.format_sizeof(n)}{self.unit}"
        return f"{n:,.1f}" if n % 1 and n < 100 else f"{n:,.0f}"

    def close(self) -> None:
        if self.plain:
            self.leave = False
        super().close()

    @classmethod
    def write(cls, s: str, file: Any = None, end: str = "\n", nolock: bool = False) -> None:
        """A line above the bar; of results, which are no progress, also where there is none."""
        if shown:
            tqdm.write(s, file=file, end=end, nolock=nolock)
