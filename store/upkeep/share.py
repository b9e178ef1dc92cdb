"""Giving a local store to a Unix group: setgid folders hand the group down, so that no member need think of it."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from pipeline.store.errors import StoreError
from pipeline.store.files.local import explain
from pipeline.store.files.places import is_remote
from pipeline.store.store import Store


def share_with(where: str, group: str) -> int:
    """Make the store at `where`, new or old, readable and writable for `group`; returns how many paths there are.

    What is written later follows (see `Files`). Raises StoreError for an unknown group or missing permission.
    """
    if is_remote(where):
        raise StoreError(f"{where}: who may read and write a bucket is set where the bucket is")
    root = Path(Store.create(where).files.root)
    count = 0
    try:
        for folder, _, names in os.walk(root):
            paths = [Path(folder), *(Path(folder) / name for name in names)]
            for path in paths:
                if path.is_symlink():
                    continue
                shutil.chown(path, group=group)
                mode = stat.S_IMODE(path.stat().st_mode) | stat.S_IRGRP | stat.S_IWGRP
                path.chmod(mode | stat.S_IXGRP | stat.S_ISGID if path.is_dir() else mode)
                count += 1
    except LookupError:
        raise StoreError(f"there is no group {group!r} on this machine") from None
    except OSError as error:
        raise explain(error, "sharing", str(root)) from error
    return count
