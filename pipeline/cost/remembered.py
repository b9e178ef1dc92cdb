"""Rates of this machine, remembered with their dates: measuring them takes longer than everything else `plan` does.

A file for each machine in the user's cache folder, so that a home directory shared by many machines mixes nothing up.
Each rate is kept under a digest of what it was measured on (shapes, number format, disk); another shape is measured.
"""

from __future__ import annotations

import math
import os
import platform
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from warnings import warn

import torch

from pipeline.store.errors import Notice, StoreError
from pipeline.store.files.cache import keep_file
from pipeline.store.files.places import cache_folder
from pipeline.store.format.digest import digest_json
from pipeline.store.format.document import dump_document, load_document

KIND = "activation-rates"
MAX_BYTES, MAX_RATES = 1 << 20, 1000  # of which the newest are kept
Figures = tuple[float | None, ...]


def machine(device: torch.device) -> dict[str, Any]:
    """What a rate depends on beside what is measured: the machine, what computes on it and with which torch."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "host": socket.gethostname(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": gpu or device.type,
        "torch": torch.__version__,
    }


class Remembered:
    """The rates of `machine(device)`; with `again` those of the file are not used, but written anew.

    `dates`: when the rates that were asked for had been measured, of those that were remembered; `measured`: how many
    were not. A file that is damaged, foreign or of another machine is left out of account with a `Notice`.
    """

    def __init__(self, device: torch.device, again: bool = False) -> None:
        self.machine, self.again = machine(device), again
        self.path = cache_folder() / f"rates-{digest_json(self.machine)[:16]}.json"
        self.dates: list[str] = []
        self._new: set[str] = set()
        self._known = self._read()

    @property
    def measured(self) -> int:
        return len(self._new)

    def rate(self, what: str, about: Any, measure: Callable[[], Figures]) -> Figures:
        """The rate `what`, measured on `about` (JSON): the remembered one, else what `measure` gives."""
        name = digest_json([what, about])
        if name in self._new or (name in self._known and not self.again):
            if name not in self._new:
                self.dates.append(self._known[name]["date"])
            return tuple(self._known[name]["figures"])
        figures = measure()
        self._new.add(name)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        self._known[name] = {"what": what, "date": date, "figures": list(figures)}
        return figures

    def save(self) -> None:
        """Write the file anew where something was measured; a disk that does not take it is no error."""
        if not self.measured:
            return
        newest = sorted(self._known.items(), key=lambda item: item[1]["date"])[-MAX_RATES:]
        document = {"kind": KIND, "format": 1, "machine": self.machine, "rates": dict(newest)}
        keep_file(self.path, dump_document(document))

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            with self.path.open("rb") as file:
                document = load_document(file.read(MAX_BYTES), self.path, KIND)
            rates = document.get("rates")
            if document.get("machine") != self.machine or not isinstance(rates, dict):
                raise StoreError(f"{self.path} is of another machine")
            if not all(map(_sound, rates.values())):
                raise StoreError(f"{self.path} holds what is no rate")
        except FileNotFoundError:
            return {}
        except (OSError, StoreError) as error:
            warn(f"{error}: its rates are not used, this machine is measured", Notice, stacklevel=2)
            return {}
        return rates


def _sound(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("figures"), list):
        return False
    try:
        datetime.fromisoformat(entry["date"])
    except (KeyError, TypeError, ValueError):
        return False
    return all(f is None or (type(f) in (int, float) and math.isfinite(f) and f > 0) for f in entry["figures"])


def _processor() -> str:
    """The processor's model, as the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
