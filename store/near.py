"""The nearest of the names that there are, for a message about one that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near(name: str, known: Iterable[str]) -> str:
    """ "; did you mean …?" of the one of `known` that is spelled most like `name`, or nothing."""
    by_lower = {str(k).lower(): str(k) for k in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[found[0]]}?" if found else ""
