"""Numbers computed by the official code of SHERL, LST and UniPT, one safetensors file a case.

A file says in its metadata what it is: `case`, `repository`, `commit` and `file` (the official sources), `mode` and
`config` (JSON). Its tensors are named by what they are for: `weight/NAME` and `buffer/NAME` under official names,
`backbone/NAME`, `input/NAME`, `output/NAME`, `grad/NAME`.

Modes: `eval`; `train-scaled`, train mode in which every active dropout multiplies with 0.83 instead; `train-p0`, train
mode without dropout; `train`, where there is none to begin with. The environment variable GOLDEN names another folder
of the same make; nothing depends on the values, sizes or file names of this one.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

NEEDED = {"case", "repository", "file", "mode", "config"}


@dataclass(frozen=True)
class Case:
    """One file. `about`: its metadata."""

    path: Path
    about: dict[str, str]

    @property
    def name(self) -> str:
        return self.about["case"]

    @property
    def mode(self) -> str:
        return self.about["mode"]

    @property
    def repository(self) -> str:
        return self.about["repository"]

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the official source files, sorted, without folders."""
        return tuple(sorted(Path(part.strip()).name for part in self.about["file"].split(",")))

    @cached_property
    def config(self) -> dict[str, Any]:
        """Shapes and settings."""
        return json.loads(self.about["config"])

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        with safe_open(self.path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

    def under(self, part: str) -> dict[str, Tensor]:
        """The tensors whose name begins with `part` and a slash, named by the rest."""
        return {k.removeprefix(f"{part}/"): v for k, v in self.tensors.items() if k.startswith(f"{part}/")}


def folder() -> Path:
    """The folder of cases. FileNotFoundError where GOLDEN names none: nothing found must not look like no failure."""
    named = os.environ.get("GOLDEN")
    if named and not Path(named).is_dir():
        raise FileNotFoundError(f"GOLDEN={named} is not a folder of golden files")
    return Path(named) if named else Path(__file__).parent


def cases() -> list[Case]:
    """Every case of the folder, by name."""
    found = []
    for path in sorted(folder().glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        if absent := NEEDED - about.keys():
            raise ValueError(f"{path} is no golden file: its metadata lacks {', '.join(sorted(absent))}")
        found.append(Case(path, about))
    if not found:
        raise FileNotFoundError(f"{folder()}: no golden files (*.safetensors) in here")
    return sorted(found, key=lambda case: case.name)
