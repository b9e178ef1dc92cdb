"""The tutorial "Share a store with your team", followed literally: every command of it, in its order.

Changed are only the places that a test cannot use: /data/features, the group, the bucket's server, and port numbers.
"""

from __future__ import annotations

import grp
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pipeline.extract.pretrained import local
from pipeline.store.files.places import _remote
from tests import tiny
from tests.pipeline.pages import DOCS, execute, tools
from tests.store import servers

LOSS = re.compile(r'"loss": ?([0-9.e+-]+)')
PAGE = DOCS / "tutorials" / "share.md"


def commands() -> list[str]:
    """Every line of its bash blocks, and the one command in its text."""
    found = re.findall(r"```bash\n(.*?)```|`(pipeline store merge [^`]*)`", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block, single in found for line in (block or single).splitlines() if line.strip()]


@pytest.fixture
def instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What stands for what in the tutorial; servers run, and the table is there."""
    if local("minilm") is None:
        pytest.skip("the extra `demo` is not installed: its commands need its encoder")
    pytest.importorskip("distributed", reason="distributed is not installed: its cluster not tested")
    data = tmp_path / "data"
    data.mkdir()
    rows = [f"{text}\t{'yes' if 'cat' in text else 'no'}" for text in tiny.sentences(40)]
    (tmp_path / "my.csv").write_text("\n".join(["sentence,label", *(r.replace("\t", ",") for r in rows)]) + "\n")
    scheduler = str(servers.free_port())
    with ExitStack() as stack:
        keys = stack.enter_context(servers.s3(tmp_path / "s3"))
        web = stack.enter_context(servers.http_server(data, tmp_path / "nginx"))
        project = str(Path(__file__).resolve().parents[2])
        mine = {"PIPELINE_CACHE": str(tmp_path / "cache"), "PIPELINE_USER": "ada", "PATH": tools()}
        for name, value in {**keys, **mine, "PYTHONPATH": project, "OMP_NUM_THREADS": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        _remote.cache_clear()
        instead = {
            "/data/features": f"{data}/features",
            "share team ": f"share {grp.getgrgid(os.getgid()).gr_name} ",
            "http://127.0.0.1:8080": web,
            "8786": scheduler,
        }
        yield instead
    _remote.cache_clear()


def test_every_command_works_as_written(instead: dict[str, str]) -> None:
    said: dict[str, str] = {}
    with ExitStack() as background:
        for command in commands():
            line = command
            for old, new in instead.items():
                line = line.replace(old, new)
            if line.endswith("&"):
                quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                process = subprocess.Popen(["bash", "-c", f"exec {line[:-1]}"], **quiet)
                background.callback(process.wait, 30)
                background.callback(process.terminate)
            else:
                said[command] = execute(line)

    def of(start: str) -> str:
        return next(text for command, text in said.items() if command.startswith(start))

    assert len(said) >= 15 and [c for c in commands() if c.startswith("dask worker")]
    assert "may read and write" in of("pipeline store share")
    assert "40 samples" in of("pipeline store status") and "by ada" in of("pipeline store status")
    assert "samples computed again agree" in of("pipeline store verify --deep")
    assert "nothing is damaged" in of("pipeline store repair")
    assert "1 were there" in of("pipeline store merge")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert os.environ[name] not in "".join(said.values())
    losses = {p.name: [float(v) for v in LOSS.findall((p / "log.jsonl").read_text())] for p in Path("runs").iterdir()}
    assert losses.keys() == {"from-bucket", "from-mirror", "two"} and losses["two"]
    assert losses["from-bucket"] == losses["from-mirror"]
    # Each of several processes draws dropout of its own.
    assert losses["two"] == pytest.approx(losses["from-bucket"], rel=2e-2)
