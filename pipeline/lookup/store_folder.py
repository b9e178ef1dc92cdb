"""Where the store is when nobody says."""

from __future__ import annotations

import os

DEFAULT_STORE = "activations"


def store_place(where: str = "") -> str:
    """`where`, else $PIPELINE_STORE, else ./activations."""
    return where or os.environ.get("PIPELINE_STORE") or DEFAULT_STORE
