"""Ten SIGKILLs; a hundred are `python -m tests.extract.kills --kills 100`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.extract.kills import Killing


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here: not killed")
def test_kills_lose_nothing_sealed(tmp_path: Path) -> None:
    done = Killing.prepare(tmp_path, samples=60).run(tmp_path, kills=10)
    assert done["kills"] == 10 and done["after_a_seal"]
