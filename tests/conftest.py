"""Shared fixtures. Tests run on one thread: they are small, and CI has two cores."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def pytest_configure(config: pytest.Config) -> None:
    """What a process that runs tests needs; the one that only hands them to workers need not load torch."""
    # Tests kill processes, no machine goes down: what a disk would be waited for, again and again, nobody would see.
    # Processes that a test starts do sync; that and what is synced before what is tested in tests/store/test_segments.
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        import torch

        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept in the user's cache (remote files, rates of the machine, manifests) is each test's own."""
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path_factory.getbasetemp() / "caches" / secrets.token_hex(8)))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """family → folder of a small checkpoint, made when first asked for."""
    from tests import decoders, tiny, vision

    base = tmp_path_factory.mktemp("checkpoints")

    class Made(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = {**tiny.CHECKPOINTS, **vision.CHECKPOINTS, "decoder": decoders.checkpoint}[name](base / name)
            return self[name]

    return Made()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 images in two classes."""
    from tests import vision

    return vision.write_folder(tmp_path_factory.mktemp("pictures") / "halves")


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small two-class sentence-pair table."""
    from tests import tiny

    return tiny.write_table(tmp_path_factory.mktemp("table") / "pairs.tsv", 120)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data; skips where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is not there: real data not tested")
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Golden cases without a system are named, for a skipped one must not look like a passed one."""
    for report in terminalreporter.getreports("skipped"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        if "golden: " in reason:
            terminalreporter.write_line(reason)
