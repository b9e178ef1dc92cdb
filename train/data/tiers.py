"""Where blocks stay between epochs: `device` or `host` memory when all of them fit, else nowhere (`disk`).

Blocks are kept as stored, so a tier takes no more than the store does; the first epoch fills it while it trains.
"""

from __future__ import annotations

import os

import torch
from torch.utils.data import get_worker_info

from pipeline.train.data.memory import available_memory


def choose(nbytes: int, host_bytes: int | None, device: torch.device | None = None, tier: str = "auto") -> str:
    """The tier for `nbytes` of blocks: "device" if there is a GPU and they fit in half of its free memory, "host" if
    they fit in `host_bytes` (None: half of the memory available now), else "disk". Any other `tier` than "auto" is
    taken as it is; on a CPU the memory of the device is the host's."""
    gpu = device is not None and device.type == "cuda"
    if tier != "auto":
        return "host" if tier == "device" and not gpu else tier
    if gpu and nbytes <= torch.cuda.mem_get_info(device)[0] // 2:
        return "device"
    if host_bytes is None:
        # Every rank of a machine keeps blocks of its own, and so does every worker of a loader.
        worker = get_worker_info()
        keepers = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) * (worker.num_workers if worker else 1)
        host_bytes = available_memory() // (2 * keepers)
    return "host" if nbytes <= host_bytes else "disk"
