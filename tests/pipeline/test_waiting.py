"""Nothing is waited for in silence, and nothing for ever: pipes, servers that do not answer, places that cannot be."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.commands.train import make_folder
from pipeline.store import Store, StoreError, UserError
from pipeline.store.files.places import _remote
from tests.pipeline.test_errors import refused, run
from tests.store import servers
from tests.store.helpers import sealed, space


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of a client of S3, and no cache."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: S3 not tested")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true", "PIPELINE_CACHE_SIZE": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    _remote.cache_clear()


@pytest.mark.parametrize("option", ["--task", "--validation", "--test"])
def test_a_pipe_is_refused(tmp_path: Path, table: Path, checkpoints: Any, option: str) -> None:
    """In a process of its own, since waiting for a pipe cannot be interrupted from within."""
    os.mkfifo(tmp_path / "my.csv")
    code = (
        "import sys; from pathlib import Path\n"
        "from pipeline.extract.tasks import load_task; from pipeline.store import UserError\n"
        "task, option, pipe = sys.argv[1:]\n"
        "more = {} if option == '--task' else {option.strip('-'): Path(pipe)}\n"
        "try: load_task(pipe if option == '--task' else task, text='first', label='label', **more)\n"
        "except UserError as error: print(error)"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", code, str(table), option, str(tmp_path / "my.csv")]
    done = subprocess.run(command, cwd=root, capture_output=True, timeout=100, text=True)
    assert "my.csv: a pipe or device, not a file" in done.stdout, done.stderr


@pytest.mark.parametrize("kind", ["s3", "http"])
def test_a_server_that_does_not_answer(
    client: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """It takes the connection and is silent: a line says who is waited for, and the wait ends."""
    monkeypatch.setattr("pipeline.store.files.remote.ANSWER_SECONDS", 1.0)
    monkeypatch.setattr("pipeline.store.files.mirror.ANSWER_SECONDS", 1.0)
    monkeypatch.setattr("pipeline.store.files.remote.STRANGER_SECONDS", 1.5)
    monkeypatch.setattr("pipeline.store.files.remote.QUIET_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{here}")
        began = time.monotonic()
        with caplog.at_level(logging.WARNING), pytest.raises(StoreError, match="check network and address") as caught:
            Store.open("s3://team/store" if kind == "s3" else f"http://{here}/store")
    assert time.monotonic() - began < 15
    assert here in str(caught.value) and "\n" not in str(caught.value)
    said = [r.getMessage() for r in caplog.records if "waiting for" in r.getMessage()]
    assert len(said) == 1 and here in said[0] and "store.json" in said[0]


def test_a_server_that_is_not_there(client: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command, with the settings that users have."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{servers.free_port()}")
    began = time.monotonic()
    refused(run("store", "status", "--store", "s3://team/store"), "check network and address", "127.0.0.1")
    assert time.monotonic() - began < 12


def test_a_bucket_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sealed(space(tmp_path), [1])
    with servers.s3(tmp_path / "s3") as environment:
        for name, value in {**environment, "PIPELINE_CACHE_SIZE": "0"}.items():
            monkeypatch.setenv(name, value)
        _remote.cache_clear()
        refused(run("store", "push", "s3://nobodys/x", "--store", tmp_path / "store"), "no bucket 'nobodys'")


@pytest.mark.parametrize("inside", ["", "deeper/run"])
def test_out_that_is_a_file(tmp_path: Path, inside: str) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match=r"--out .*: the folder cannot be made \(.*file is a file\)"):
        make_folder(file / inside)
    assert file.read_text() == "mine"


def test_commands_with_an_out_that_is_a_file(tmp_path: Path, table: Path, checkpoints: Any) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    out.write_text("mine")
    task = ["--model", checkpoints["bert"], "--task", table, "--store", store]
    columns = ["--text", "first", "--text-pair", "second", "--label", "label"]
    assert run("extract", *task, *columns, "--for", "probe").exit_code == 0
    refused(run("train", *task, "--tuner", "probe", "--out", out), "--out", "is a file")
    refused(run("compare", *task, "--tuners", "probe", "--out", out), "--out", "is a file")
    assert out.read_text() == "mine"
