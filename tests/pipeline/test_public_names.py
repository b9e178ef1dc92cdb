"""What `import pipeline` shows of itself, installed or not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
from pipeline import store

ROOT = Path(__file__).parents[2]
NOT_INSTALLED = """
import sys
from importlib import metadata
def missing(name):
    raise metadata.PackageNotFoundError(name)
metadata.version = missing
import pipeline
print(pipeline.__version__)
sys.argv = ["pipeline", "--version"]
from pipeline.__main__ import run
run()
"""


@pytest.mark.parametrize("module", [pipeline, store])
def test_dir_shows_every_public_name(module) -> None:
    assert set(module.__all__) <= set(dir(module))
    assert all(getattr(module, name) is not None for name in module.__all__)


@pytest.mark.parametrize("module", [pipeline, store])
def test_an_unknown_name_says_of_which_module(module) -> None:
    with pytest.raises(AttributeError, match=f"^module '{module.__name__}' has no attribute 'nothing'$"):
        _ = module.nothing


def test_a_version_without_an_installation() -> None:
    """The sources on PYTHONPATH and nothing installed: there is no version, and that is said."""
    done = subprocess.run([sys.executable, "-c", NOT_INSTALLED], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "unknown (not installed)\npipeline, version unknown (not installed)\n", done.stderr
