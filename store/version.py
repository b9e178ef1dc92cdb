"""The version of this project that is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

UNKNOWN = "unknown (not installed)"


def project_version() -> str:
    """What pip has noted, or `UNKNOWN` where the sources are on the path (PYTHONPATH) and nothing is installed."""
    try:
        return version("activation-pipeline")
    except PackageNotFoundError:
        return UNKNOWN
