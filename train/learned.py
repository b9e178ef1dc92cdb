"""`Learned`: what a trained tuner can show of itself, for reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Learned:
    """Numbers with names. `values`: (n,) one each of `names`; or (n, n), how each of `names` goes with each. `about`:
    one sentence on what they mean."""

    title: str
    about: str
    names: Sequence[str]
    values: Tensor


@dataclass
class Mean:
    """The mean over all rows that were added."""

    total: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, values: Tensor) -> None:
        """`values`: (rows, …)."""
        summed = values.detach().double().sum(0).cpu()
        self.total[name] = self.total[name] + summed if name in self.total else summed
        self.rows[name] = self.rows.get(name, 0) + len(values)

    def of(self, name: str) -> Tensor:
        return self.total[name] / max(1, self.rows[name])
