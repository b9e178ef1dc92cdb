"""Extraction by the workers of a cluster: the states of one process, and a killed worker fails nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.extract.encoding import decode
from pipeline.store import Store
from tests import tiny
from tests.pipeline.test_errors import refused, run
from tests.store.servers import free_port

distributed = pytest.importorskip("distributed", reason="distributed is not installed: clusters not tested")
ROWS = 400


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, checkpoints: Any) -> list[Any]:
    table = tiny.write_table(tmp_path_factory.mktemp("wide") / "wide.tsv", ROWS)
    return ["extract", "--model", checkpoints["bert"], "--task", table, "--text", "first", "--text-pair", "second",
            "--label", "label", "--for", "lst", "--format", "float32", "--batch-tokens", 64,
            "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, command: list[Any]) -> dict[str, torch.Tensor]:
    store = tmp_path_factory.mktemp("alone") / "store"
    assert run(*command, "--store", store).exit_code == 0
    return states(store)


def states(store: Path) -> dict[str, torch.Tensor]:
    """Sample key → (rows, all states side by side); asserts that none is stored twice."""
    out: dict[str, torch.Tensor] = {}
    (space,) = Store.open(store).spaces()
    for segment in space.segments():
        read = segment.read(sorted(segment.states))
        rows = torch.cat([decode(read.states[name]) for name in sorted(segment.states)], 1)
        offsets = read.offsets("encoder")
        for i, key in enumerate(read.keys):
            assert key not in out
            out[key] = rows[offsets[i] : offsets[i + 1]]
    return out


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-5)


def test_a_local_cluster(command: list[Any], alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, processes=False, dashboard_address=None
    ) as cluster:
        address = ["--scheduler", cluster.scheduler_address, "--store", tmp_path / "store"]
        result = run(*command, *address, "--json")
        assert result.exit_code == 0, result.output
        done = json.loads(result.stdout)
        assert done["computed"] == len(alone) and done["segments"] > 2
        assert_same(states(tmp_path / "store"), alone)
        assert json.loads(run(*command, *address, "--json").stdout)["computed"] == 0
    assert not [p for p in tmp_path.rglob("*") if p.parent.name == "work"], "the work file stayed"


@contextmanager
def cluster(workers: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler in this process and workers in processes of their own."""
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    quiet["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    with distributed.LocalCluster(n_workers=0, processes=True, dashboard_address=None) as local:
        address = local.scheduler_address
        processes = [subprocess.Popen([*worker, address], **quiet) for _ in range(workers)]
        try:
            yield address, processes
        finally:
            for process in processes:
                process.kill()
                process.wait()


def test_a_killed_worker_fails_nothing(command: list[Any], alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    store = tmp_path / "store"
    with cluster(2) as (address, workers):
        with distributed.Client(address, timeout=60) as client:
            client.wait_for_workers(2, timeout=120)
        killed = threading.Thread(target=_kill_when_sealed, args=(store, workers[0]))
        killed.start()
        result = run(*command, "--scheduler", address, "--store", store, "--json")
        killed.join()
    assert result.exit_code == 0, result.output
    assert workers[0].returncode is not None
    assert_same(states(store), alone)
    assert Store.open(store).verify(deep=True) == []


def _kill_when_sealed(store: Path, worker: subprocess.Popen[bytes]) -> None:
    for _ in range(3000):
        if any(store.glob("spaces/*/segments/*/manifest.json")):
            break
        time.sleep(0.01)
    worker.kill()


def test_no_scheduler_is_one_line(command: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    refused(run(*command, "--scheduler", address, "--store", tmp_path / "s"), "--scheduler", address)
