"""`Buffers`: memory for batches that is used again once nobody holds what was made in it.

Fresh memory costs a page fault every 4 kB and is given back to the system when a batch is dropped: on a virtual machine
more than gathering the rows. Training lets the whole process keep what it frees (`kernels.memory`); a stream in a
process of somebody else's must not, so it keeps the few buffers of its own batches instead.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from threading import Lock

import numpy as np
import torch
from torch import Tensor

SMALL = 1 << 16  # bytes below which the allocator has memory at hand


def _references(buffers: Sequence[np.ndarray], place: int) -> int:
    """How many references there are to a buffer, in one and the same count whoever asks."""
    return sys.getrefcount(buffers[place])


_UNUSED = _references([np.empty(0)], 0)  # of a buffer that its list alone holds; versions of Python count differently


class Buffers:
    """At most `most` buffers, each handed out again when the tensor made in it, its views and whatever else shares its
    memory are gone; beyond that, plain new memory. For any number of threads."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._buffers: list[np.ndarray] = []
        self._lock = Lock()

    def empty(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """A tensor (rows, width) with undefined content, in memory of the CPU that nothing else uses."""
        nbytes = rows * width * dtype.itemsize
        if nbytes < SMALL:
            return torch.empty(rows, width, dtype=dtype)
        with self._lock:
            # A tensor holds the array that it was made of, and that one `buffer`, whose references tell who is left.
            buffer = self._unused(nbytes)
            if buffer is None:
                return torch.empty(rows, width, dtype=dtype)
            return torch.from_numpy(buffer[:nbytes]).view(dtype).view(rows, width)

    def _unused(self, nbytes: int) -> np.ndarray | None:
        """The smallest unused buffer that is large enough; else a new one, in the place of an unused smaller one where
        there are `most` already."""
        found, outgrown = -1, -1
        for place in range(len(self._buffers)):
            if _references(self._buffers, place) > _UNUSED:
                continue
            buffer = self._buffers[place]
            if buffer.nbytes < nbytes:
                outgrown = place
            elif found < 0 or buffer.nbytes < self._buffers[found].nbytes:
                found = place
        if found >= 0:
            return self._buffers[found]
        made = torch.empty(nbytes + nbytes // 8, dtype=torch.uint8).numpy()  # torch aligns as its kernels like it
        if outgrown >= 0:
            self._buffers[outgrown] = made
        elif len(self._buffers) < self.most:
            self._buffers.append(made)
        else:
            return None
        return made
