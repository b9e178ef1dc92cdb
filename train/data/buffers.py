"""`Buffers`: memory for batches that is used again once nobody holds what was made in it.

Fresh memory costs a page fault every 4 kB and is given back to the system when a batch is dropped: on a virtual machine
more than gathering the rows. Training lets the whole process keep what it frees (`kernels.memory`); a stream in a
process of somebody else's must not, so it keeps the few buffers of its own batches instead.
"""

from __future__ import annotations

from threading import Lock
from typing import Any
from weakref import ReferenceType, ref

import numpy as np
import torch
from torch import Tensor

SMALL = 1 << 16  # bytes below which the allocator has memory at hand


class Buffers:
    """At most `most` buffers, each handed out again when the tensor made in it, its views and whatever else shares its
    memory are gone; beyond that, plain new memory. For any number of threads."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._buffers: list[np.ndarray] = []
        self._views: list[ReferenceType[Any] | None] = []  # of each buffer the part that was handed out last
        self._lock = Lock()

    def empty(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """A tensor (rows, width) with undefined content, in memory of the CPU that nothing else uses."""
        nbytes = rows * width * dtype.itemsize
        if nbytes < SMALL:
            return torch.empty(rows, width, dtype=dtype)
        with self._lock:
            place = self._unused(nbytes)
            if place is None:
                return torch.empty(rows, width, dtype=dtype)
            # The memory of a tensor holds the array that it was made of, and nobody else does: while that lives, so
            # does a tensor. Counts of references would not tell, for from Python 3.14 on a local name may not count.
            part = self._buffers[place][:nbytes]
            self._views[place] = ref(part)
            return torch.from_numpy(part).view(dtype).view(rows, width)

    def _unused(self, nbytes: int) -> int | None:
        """The place of the smallest unused buffer that is large enough; else of a new one, that of an unused smaller
        one if there is such."""
        found, outgrown = -1, -1
        for place, (buffer, view) in enumerate(zip(self._buffers, self._views, strict=True)):
            if view is not None and view() is not None:
                continue
            if buffer.nbytes < nbytes:
                outgrown = place
            elif found < 0 or buffer.nbytes < self._buffers[found].nbytes:
                found = place
        if found >= 0:
            return found
        if outgrown < 0 and len(self._buffers) == self.most:
            return None
        made = torch.empty(nbytes + nbytes // 8, dtype=torch.uint8).numpy()  # torch aligns as its kernels like it
        if outgrown < 0:
            self._buffers.append(made)
            self._views.append(None)
            return len(self._buffers) - 1
        self._buffers[outgrown], self._views[outgrown] = made, None
        return outgrown
