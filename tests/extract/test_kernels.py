"""One switch for what only makes a CPU faster, and nothing of it in a process that only streams."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pipeline.extract.kernels import enabled, memory, spin_briefly
from pipeline.extract.kernels.dropout import drop


def test_switched_off_torch_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn() -> torch.Tensor:
        torch.manual_seed(0)
        return drop(torch.ones(64, 64), 0.3, True)

    torch.manual_seed(0)
    torchs = F.dropout(torch.ones(64, 64), 0.3, True)
    assert not torch.equal(drawn(), torchs)
    monkeypatch.setenv("PIPELINE_KERNELS", "off")
    assert not enabled() and torch.equal(drawn(), torchs)


def test_switched_off_the_process_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIPELINE_KERNELS", "off")
    spin_briefly()
    assert "GOMP_SPINCOUNT" not in os.environ
    assert not memory.keep_freed_memory.__wrapped__()


STREAM = """
import os, sys
from pathlib import Path
before = dict(os.environ)
import pipeline
from pipeline.extract.kernels import memory
from tests.train.test_stream import real_space
from tests.train.toys import STATES, key
from pipeline.train.data.store_source import StoreSource, StreamOptions
space = real_space(Path(sys.argv[1]), "float32")
options = StreamOptions(batch_size=8, host_bytes=1 << 30)
source = StoreSource(space, [key(i) for i in range(80)], None, STATES, (), options)
print(sum(len(batch.index) for epoch in range(2) for batch in source.epoch(epoch)))
source.forget()
assert memory.keep_freed_memory.cache_info().currsize == 0
assert {k: v for k, v in os.environ.items() if "OMP" in k} == {k: v for k, v in before.items() if "OMP" in k}
"""


def test_a_stream_changes_nothing_of_the_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STREAM, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["160"]
