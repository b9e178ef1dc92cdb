"""One suite for every place a store can live: a folder, an S3 bucket, an HTTP mirror, each with and without a cache."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.store import MissingStates, Space, Store, StoreError, TaskTable, UserError, read_block
from pipeline.store.files.cache import Cache
from pipeline.store.files.places import _remote, cache_bytes, open_files
from pipeline.store.files.remote import redact
from pipeline.store.segments.blocks import _segment
from pipeline.store.upkeep.repair import repair
from pipeline.store.upkeep.transfer import transfer
from tests.benchmarks.scale import counted_requests
from tests.store import servers
from tests.store.helpers import assert_equal, key, samples, sealed, snapshot, space

STATES, COLUMNS = ["encoder.3", "decoder.1"], ["encoder.ids", "decoder.ids"]
NUMBERS = list(range(12))
DIGEST = "ab" * 16


def fill(path: Path) -> Store:
    """A store with a base, a supplement, a table and weights."""
    home = space(path, weights=DIGEST)
    base = sealed(home, NUMBERS[:8], states=("encoder.3",))
    sealed(home, NUMBERS[:8], base, states=("encoder.3", "decoder.1"))
    sealed(home, NUMBERS[8:])
    home.save_table(TaskTable({"task": "rte", "split": "train"}, [key(n) for n in NUMBERS], [0] * 12))
    store = Store(home.files)
    store.save_weights(DIGEST, {"tail.safetensors": {"w": torch.ones(3)}, "config.json": {"n": 1}})
    return store


@dataclass
class Place:
    """A store's content at `url`, which stands in `folder` on this disk too."""

    url: str
    folder: Path
    kind: str


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("s3")
    with servers.s3(folder) as environment:
        yield folder / "team", environment


@pytest.fixture
def team(bucket: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the bucket `team`, which this test has the keys of."""
    for variable, value in bucket[1].items():
        monkeypatch.setenv(variable, value)
    return bucket[0]


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("web")
    with servers.http_server(folder, tmp_path_factory.mktemp("nginx")) as url:
        yield folder, url


@pytest.fixture(params=["local", "s3", "http", "s3 cached", "http cached"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    kind = request.param
    use_cache(monkeypatch, tmp_path, "1GB" if "cached" in kind else "0")
    name = tmp_path.name
    if kind == "local":
        folder, url = tmp_path / "store", str(tmp_path / "store")
    elif kind.startswith("s3"):
        folder, url = request.getfixturevalue("team") / name / "store", f"s3://team/{name}/store"
    else:
        root, base = request.getfixturevalue("web")
        folder, url = root / name / "store", f"{base}/{name}/store"
    fill(folder.parent)
    yield Place(url, folder, kind)
    shutil.rmtree(folder.parent, ignore_errors=True)
    _segment.cache_clear()
    _remote.cache_clear()


def settle(place: Place) -> None:
    """rclone looks at the disk again after a tenth of a second."""
    time.sleep(0.3 if place.kind.startswith("s3") else 0)


def use_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: str) -> None:
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIPELINE_CACHE_SIZE", size)
    _segment.cache_clear()
    _remote.cache_clear()


def read_all(url: str) -> Any:
    (home,) = Store.open(url).spaces()
    plan = home.plan([key(n) for n in NUMBERS], STATES, COLUMNS)
    return [read_block(block) for block in plan.blocks]


def test_reading(place: Place) -> None:
    before = snapshot(place.folder)
    first, second = read_all(place.url)
    assert_equal(first, samples(NUMBERS[:8]))
    assert_equal(second, samples(NUMBERS[8:]))
    store = Store.open(place.url)
    (home,) = store.spaces()
    assert home.load_table("rte", "train").keys == [key(n) for n in NUMBERS]
    assert store.load_json(DIGEST, "config.json") == {"n": 1}
    assert store.load_tensors(DIGEST, "tail.safetensors")["w"].tolist() == [1.0] * 3
    assert store.verify() == [] and store.verify(deep=True) == []
    with pytest.raises(MissingStates):
        home.plan([key(99)], STATES)
    assert snapshot(place.folder) == before, "reading wrote something"


@pytest.mark.parametrize("damage", ["flip", "missing", "short", "long"])
@pytest.mark.parametrize("file", ["manifest.json", "zarr.json", "encoder.3/c.0.0"])
def test_damage_is_never_data(place: Place, file: str, damage: str) -> None:
    if place.kind in ("s3", "http") and damage in ("short", "long"):
        pytest.skip("the same with a cache")
    victim = next(p for p in sorted(place.folder.glob("spaces/*/segments/*")) if (p / file).exists()) / file
    data = victim.read_bytes()
    changed = {"flip": data[:50] + bytes([data[50] ^ 4]) + data[51:], "short": data[:-3], "long": data + b"x"}
    victim.unlink() if damage == "missing" else victim.write_bytes(changed[damage])
    settle(place)
    with pytest.raises(StoreError):
        read_all(place.url)
    assert Store.open(place.url).verify(deep=True)
    assert damage == "flip" or Store.open(place.url).verify()
    victim.write_bytes(data)
    settle(place)
    assert_equal(read_all(place.url)[0], samples(NUMBERS[:8]))


@pytest.mark.parametrize("file", ["c.0.0", "manifest.json", "rte/train-12-*", "tail.safetensors"])
def test_verify_looks_at_what_is_there_not_at_its_copies(place: Place, file: str) -> None:
    """Everything was read before it changed, so that a cache has it as it was."""
    read_all(place.url)
    store = Store.open(place.url)
    (home,) = store.spaces()
    home.load_table("rte", "train")
    store.load_tensors(DIGEST, "tail.safetensors")
    segments = home.segments()
    parent = "weights" if file == "tail.safetensors" else "spaces"
    victim = next(p for p in sorted((place.folder / parent).rglob(file)) if "decoder" not in str(p))
    data = victim.read_bytes()
    middle = len(data) // 2
    victim.write_bytes(data[:middle] + bytes(b ^ 1 for b in data[middle : middle + 8]) + data[middle + 8 :])
    settle(place)
    for opened in (store, Store.open(place.url)):  # one that has all of it in memory, too
        (problem,) = {(p.segment, p.file) for p in opened.verify(deep=True)}
        assert victim.match(f"*/{problem[1]}") or problem[1] == str(victim.relative_to(place.folder))
    assert bool(store.verify()) == (file == "manifest.json")
    for segment in segments if file == "c.0.0" else ():  # `gc` asks each
        assert bool(segment.verify(deep=True)) == (segment.id in str(victim))
    assert repair(place.url, dry_run=True).problems
    if "cached" in place.kind:
        assert_equal(read_all(place.url)[0], samples(NUMBERS[:8]))


def test_requests_to_a_bucket(team: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Manifests are asked for once, side by side; all else is in the listings of folders, however many segments."""
    use_cache(monkeypatch, tmp_path, "1GB")
    home = space(team / tmp_path.name)
    for number in range(6):
        sealed(home, [number])
    url = f"s3://team/{tmp_path.name}/store"
    sent = counted_requests(url)

    def asked(what: Callable[[Space], Any]) -> dict[str, int]:
        (opened,) = Store.open(url).spaces()
        sent.clear()
        what(opened)
        return dict(sent)

    assert asked(Space.segments) == {"LIST": 2, "GET": 6}
    assert asked(Space.segments) == {"LIST": 2}
    # What it vouches for it has read, copies or not: the space's identity too, which takes the others.
    assert asked(Space.verify) == {"LIST": 3, "HEAD": 2, "GET": 7}
    next(home.path.glob("segments/*/zarr.json")).unlink()
    time.sleep(0.3)
    (opened,) = Store.open(url).spaces()
    assert [(p.file, p.what) for p in opened.verify()] == [("zarr.json", "is missing")]


def test_many_files_are_listed_by_pages(team: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_cache(monkeypatch, tmp_path, "0")
    names = [f"{number:04d}/file" for number in range(1005)]
    for name in names:
        path = team / tmp_path.name / "many" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * int(name[:4]))
    files = open_files(f"s3://team/{tmp_path.name}")
    sent = counted_requests(files.root)
    assert files.walk("many") == names
    assert files.names("many") == [name[:4] for name in names]
    assert files.listed("many") == {name: int(name[:4]) for name in names}
    assert files.names("none") == files.walk("none") == files.names("many/0007/file") == []
    assert sent["LIST"] == 9 and not sent["HEAD"]


def test_writing(place: Place) -> None:
    store = Store.open(place.url)
    (home,) = store.spaces()
    if place.kind.startswith("http"):
        with pytest.raises(StoreError, match="read-only mirror"):
            sealed(home, [50])
        return
    sealed(home, [50])
    table = TaskTable({"task": "new", "split": "train"}, [key(50)], [1])
    home.save_table(table)
    store.save_weights(DIGEST, {"more.json": {}})
    (again,) = Store(open_files(place.url)).spaces()
    assert again.load_table("new", "train").keys == table.keys
    assert_equal(read_block(again.plan([key(50)], STATES, COLUMNS).blocks[0]), samples([50]))
    assert Store.open(place.folder).verify(deep=True) == []


def test_what_is_no_store(place: Place) -> None:
    for wrong in (f"{place.url}/spaces", f"{place.url}x"):
        with pytest.raises(StoreError) as caught:
            Store.open(wrong)
        assert "\n" not in str(caught.value) and "store" in str(caught.value)


def test_copies_are_equal(place: Place, tmp_path: Path) -> None:
    """Pull from everywhere, and again: nothing is copied twice; the copy has the same bytes."""
    source = Store.open(place.url)
    target = Store.create(tmp_path / "copy")
    done = transfer(source, target)
    assert (done.segments, done.skipped, done.tables, done.problems) == (3, 0, 1, [])
    assert content(tmp_path / "copy") == content(place.folder)
    again = transfer(source, target)
    assert (again.segments, again.skipped, again.bytes) == (0, 3, 0)
    assert target.verify(deep=True) == []


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_cache_answers_the_second_time(place: Place) -> None:
    if "cached" not in place.kind:
        pytest.skip("no cache here")
    read_all(place.url)
    files: Any = open_files(place.url)
    (home,) = Store.open(place.url).spaces()
    plan = home.plan([key(n) for n in NUMBERS], STATES, COLUMNS)
    before = files.fetched
    for block in plan.blocks:
        read_block(block)
    assert files.fetched == before and files.cache.hits


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    import os

    cache = Cache(tmp_path, 1000)
    for number in range(4):
        cache.put(f"k{number}", bytes([number]) * 200)
        os.utime(cache._path(f"k{number}"), (number, number))
    assert cache.get("k0") == b"\0" * 200  # Now the newest.
    cache.put("k4", b"x" * 200)
    assert cache.nbytes <= 1000
    assert cache.get("k0") and cache.get("k4") and cache.get("k1") is None
    cache.put("huge", b"x" * 2000)
    assert cache.get("huge") is None
    path = cache._path("k0")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"!")
    assert cache.get("k0") is None and not path.exists()


def test_urls_and_messages_hold_no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for url in ("s3://AKIA:hunter2@team/x", "https://me:hunter2@host/x", "https://host/x?sig=hunter2"):
        with pytest.raises(UserError) as caught:
            Store.open(url)
        assert "hunter2" not in str(caught.value)
    with pytest.raises(UserError, match="s3://BUCKET"):
        Store.open("ftp://host/x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecretvalue")
    assert "topsecretvalue" not in redact("failed with topsecretvalue") and "pw" not in redact("http://me:pw@host/")
    monkeypatch.setenv("PIPELINE_CACHE_SIZE", "much")
    with pytest.raises(UserError, match="PIPELINE_CACHE_SIZE"):
        cache_bytes()


def test_wrong_keys_are_one_line(bucket: Any, team: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_cache(monkeypatch, tmp_path, "0")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrongwrongwrong")
    with pytest.raises(StoreError) as caught:
        Store.open("s3://team/none")
    assert "wrongwrong" not in str(caught.value) and "permission" in str(caught.value)
    assert bucket[1]["AWS_ACCESS_KEY_ID"] not in str(caught.value)


def test_no_server_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_cache(monkeypatch, tmp_path, "0")
    with pytest.raises(StoreError, match="check network and address"):
        Store.open(f"http://127.0.0.1:{servers.free_port()}/store")
