"""Two SIGKILLs of every command that writes; a hundred in all are `python -m tests.pipeline.kills --kills 100`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.pipeline.kills import Stage


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here: not killed")
def test_a_kill_at_any_step_is_made_good_by_the_same_command(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    done = stage.run(kills=16)
    assert done.total() == 16 and set(done) == set(stage.scenes)
