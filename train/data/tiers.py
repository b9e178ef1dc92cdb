"""Where blocks stay between epochs: `device` or `host` memory when all of them fit, else nowhere (`disk`).

Blocks are kept as stored, so a tier takes no more than the store does; the first epoch fills it while it trains.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch
from torch.utils.data import get_worker_info


def available_memory() -> int:
    """Bytes of memory this process may still take: the machine's, or its control group's where that is less."""
    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        most, now = _number(limit), _number(used)
        if most is not None and now is not None:
            # The group's count holds page cache, which the system takes back when memory is asked for.
            free = min(free, max(0, most - now + _cached(Path(used).with_name("memory.stat"))))
    return free


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


def _cached(stat: Path) -> int:
    try:
        lines = dict(line.split() for line in stat.read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return 0
    return int(lines.get("inactive_file", lines.get("total_inactive_file", 0)))


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
