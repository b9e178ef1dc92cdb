"""Training from a bucket and a mirror: the losses of a local store, and a second epoch that reads nothing far away.

Bytes are counted on the wire, the host tier is off: nothing but the local cache can serve the second epoch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.store.files.places import _remote
from pipeline.store.segments.blocks import _segment
from pipeline.train.data.store_source import StoreSource, StreamOptions
from tests import tiny
from tests.pipeline.test_errors import run
from tests.store import servers


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few rows: each of many trainings reads them from far away."""
    return tiny.write_table(tmp_path_factory.mktemp("table") / "pairs.tsv", 60)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, checkpoints: Any, table: Path) -> Path:
    """`features`, below a folder of its own."""
    store = tmp_path_factory.mktemp("far") / "features"
    words = ["--text", "first", "--text-pair", "second", "--label", "label", "--for", "lst", "--format", "float32"]
    assert run("extract", "--model", checkpoints["bert"], "--task", table, *words, "--store", store).exit_code == 0
    return store


@pytest.fixture(params=["s3", "http"])
def far(
    request: pytest.FixtureRequest, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, servers.Counter]]:
    """The store's URL, and what counts its server's bytes."""
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    if request.param == "http":
        with servers.http_server(stored.parent, tmp_path / "nginx") as url, servers.counted(url) as (url, counter):
            yield f"{url}/features", counter
    else:
        with servers.s3(tmp_path / "s3") as keys, servers.counted(keys["AWS_ENDPOINT_URL"]) as (url, counter):
            for name, value in {**keys, "AWS_ENDPOINT_URL": url}.items():
                monkeypatch.setenv(name, value)
            _remote.cache_clear()
            assert run("store", "push", "s3://team/features", "--store", stored).exit_code == 0
            yield "s3://team/features", counter
    _segment.cache_clear()
    _remote.cache_clear()


def test_the_second_epoch_reads_nothing_far_away(
    far: tuple[str, servers.Counter], stored: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, counter = far
    marks: list[int] = []
    epochs = StoreSource.epochs

    def marked(self: StoreSource, *which: int) -> Any:
        marks.append(counter.sent)
        for number, batch in enumerate(epochs(self, *which)):
            if number == len(self):  # all of the first epoch's blocks have been read
                marks.append(counter.sent)
            yield batch

    monkeypatch.setattr(StoreSource, "epochs", marked)
    # Many blocks and little ahead: what is in memory when an epoch begins must be a small part of it.
    small = partial(StreamOptions, block_bytes=4_000, lookahead_bytes=4_000)
    monkeypatch.setattr("pipeline.jobs.sources.StreamOptions", small)

    def losses(place: object, out: str, cache: str) -> list[float]:
        monkeypatch.setenv("PIPELINE_CACHE_SIZE", cache)
        _segment.cache_clear()
        marks.clear()
        options = ["--task", table, "--tuner", "lst", "--reduction", 4, "--epochs", 2, "--batch-size", 16]
        result = run("train", *options, "--host-memory", 0, "--store", place, "--out", tmp_path / out)
        assert result.exit_code == 0, result.output
        marks.append(counter.sent)
        lines = (tmp_path / out / "log.jsonl").read_text().splitlines()
        return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]

    states = sum(p.stat().st_size for p in stored.glob("spaces/*/segments/*/encoder.[0-9]*/c.*"))
    local = losses(stored, "local", "0")
    assert losses(url, "uncached", "0") == local
    assert marks[1] - marks[0] > states / 2 and marks[2] - marks[1] > states / 2, "without a cache both epochs read"
    assert losses(url, "first", "1GB") == local
    assert marks[1] - marks[0] > states / 2 and marks[2] == marks[1], "the second epoch read something far away"
    assert losses(url, "again", "1GB") == local
    assert marks[0] == marks[1] == marks[2], "a second run reads no states far away"
    assert losses(url, "small", str(states // 3)) == local
    cached = [p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert sum(cached) <= states // 3 and marks[2] > marks[1], "a smaller limit is kept, and what is gone is read"
