"""Who writes an unsealed segment, or a run, and whether that process still lives; no locks, nothing kept open.

A process id means something only on one machine, within one boot and one pid namespace (containers), so all three are
recorded. A writer is called dead only when all three are ours and no process has its id and start time.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any


def describe_writer() -> dict[str, Any]:
    """This process, as `writer.json` records it."""
    return {"host": _host(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_dead(writer: dict[str, Any]) -> bool:
    """Whether the process that `writer` describes surely no longer runs. False for one of another host."""
    pid, started = writer.get("pid"), writer.get("started")
    if writer.get("host") != _host() or type(pid) is not int or pid <= 0:
        return False
    if sys.platform != "linux":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False
    return _started(pid) != started


def can_tell(writer: dict[str, Any]) -> bool:
    """Whether the process that `writer` describes surely runs where `is_dead` is False of it."""
    return sys.platform == "linux" and writer.get("host") == _host() and writer.get("started") is not None


def _host() -> str:
    """Host name, boot and pid namespace, as far as the system tells."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    except OSError:
        pass
    return "/".join(parts)


def _started(pid: int) -> int | None:
    """Clock ticks since boot at which the process started; None if there is none, or no way to tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command name, in brackets, may hold spaces; a zombie no longer writes.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])
