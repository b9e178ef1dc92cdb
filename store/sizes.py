"""Sizes as people write them. Dask's `parse_bytes` reads them, too, but a store is looked after without Dask."""

from __future__ import annotations

import re

from pipeline.store.errors import UserError

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_SIZE = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?)([kmgtp]?)(i?)b?")


def parse_size(text: str, of: str = "size") -> int:
    """ "4GB", "500 MB" (decimal units), "1GiB" (of 1024), "0" → bytes. UserError otherwise, which says what the size is
    `of`."""
    match = _SIZE.fullmatch(text.replace(" ", "").lower())
    try:
        if match is None or (match[3] and not match[2]):
            raise ValueError
        return int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2]])
    except (ValueError, OverflowError):  # 1.2.3GB, 1e999
        raise UserError(f"{of} {text!r}: expected something like 4GB or 500MB") from None
