"""What stands between a tuner and a head: named rows whose shape is known before any batch is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["sample", "sequence", "map"]


@dataclass(frozen=True)
class Feature:
    """What a tuner hands out under one name: rows of `width`, packed as those of `stream`.

    `kind`: "sequence", a row a position (`stream` says whose); "map", the same with positions on a grid, `stride`
    pixels of what the backbone sees apart, the extents of which are number `place` of a sample's `maps`; "sample", one
    row a sample (`stream` is ""). A sequence with a `stride` is that of a plain vision transformer: it is a map, too,
    after its first `skip` rows. `mapped`: rows are in the space in which a head that ranks compares, which then adds no
    map of its own.
    """

    width: int
    stream: str = ""
    kind: Kind = "sample"
    stride: int = 0
    skip: int = 0
    mapped: bool = False
    place: int = 0
    maps: int = 0

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What it can be read as."""
        return (self.kind, "map") if self.kind == "sequence" and self.stride else (self.kind,)


Features = dict[str, Tensor]  # under the names of `Tuner.features`


@dataclass(frozen=True)
class Want:
    """What an objective asks of a tuner. `kinds`: of features that its head can read. `text_head`: rows of the last
    stream at the backbone's own width, for its frozen language-model head. `joint`: the width of the space in which a
    head that ranks compares samples, None where there is none."""

    kinds: tuple[Kind, ...] = ("sample", "sequence", "map")
    text_head: bool = False
    joint: int | None = None
