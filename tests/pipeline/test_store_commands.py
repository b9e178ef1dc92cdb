"""`pipeline store …` on a real store: every command, and that the next extract fills exactly the hole."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.store import Store
from pipeline.store.segments.blocks import _segment
from tests.pipeline.test_errors import refused, run
from tests.store import servers


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, checkpoints: Any, table: Path) -> tuple[Path, list[Any]]:
    """A store with the states of a tiny BERT, and the command that made it."""
    store = tmp_path_factory.mktemp("whole") / "store"
    command = ["extract", "--model", checkpoints["bert"], "--task", table, "--text", "first", "--text-pair", "second",
               "--label", "label", "--for", "lst", "--format", "float32", "--batch-size", 1]  # fmt: skip
    result = run(*command, "--store", store)
    assert result.exit_code == 0, result.output
    return store, command


@pytest.fixture
def copied(whole: tuple[Path, list[Any]], tmp_path: Path) -> tuple[Path, list[Any]]:
    store = tmp_path / "store"
    shutil.copytree(whole[0], store)
    _segment.cache_clear()
    return store, [*whole[1], "--store", store]


def ok(*args: object) -> Any:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def content(store: Path) -> dict[str, dict[str, bytes]]:
    """Sample key → state → bytes, wherever it stands."""
    from pipeline.store.segments.index import bundles
    from pipeline.store.upkeep.rewrite import read_bundle

    out: dict[str, dict[str, bytes]] = {}
    (space,) = Store.open(store).spaces()
    for bundle in bundles(space.segments()):
        names = list(bundle.holder)
        read = read_bundle(bundle, names, __import__("numpy").arange(len(bundle.base)))
        offsets = read.offsets("encoder")
        for i, key in enumerate(read.keys):
            for name, state in read.states.items():
                value = state.values[offsets[i] : offsets[i + 1]].tobytes()
                assert out.setdefault(key, {}).setdefault(name, value) == value
    return out


def first(store: Path, pattern: str) -> Path:
    return sorted(store.glob(pattern))[0]


def test_status_and_du(whole: tuple[Path, list[Any]]) -> None:
    (space,) = ok("store", "status", "--store", whole[0])["spaces"]
    assert space["samples"] and space["written"]["first"] and space["written"]["torch"] and space["unsealed"] == 0
    text = run("store", "status", "--store", whole[0]).stdout
    assert "licence:" in text and "written" in text
    usage = ok("store", "du", "--store", whole[0])
    assert sum(usage["spaces"][0]["states"].values()) == usage["spaces"][0]["bytes"] == space["bytes"]
    assert "encoder.3" in run("store", "du", "--store", whole[0]).stdout


def test_verify_three_depths(copied: tuple[Path, list[Any]], checkpoints: Any) -> None:
    store, _ = copied
    model = ["--model", checkpoints["bert"]]
    assert ok("store", "verify", "--store", store)["problems"] == []
    found = ok("store", "verify", "--deep", "--recompute", 5, "--store", store, *model)
    assert found["recomputed"][0]["samples"] == 5 and found["recomputed"][0]["worst"] < 1e-3
    victim = first(store, "spaces/*/segments/*/encoder.3/c.0.0")
    data = victim.read_bytes()
    victim.write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:])
    assert run("store", "verify", "--store", store).exit_code == 0
    result = run("store", "verify", "--deep", "--store", store)
    assert result.exit_code == 1 and "encoder.3" in result.stderr


def test_recompute_finds_wrong_states_with_good_digests(
    copied: tuple[Path, list[Any]], tmp_path: Path, checkpoints: Any
) -> None:
    """States of a changed backbone under the old identity: only depth 3 can tell."""
    import numpy as np

    store, _ = copied
    (space,) = Store.open(store).spaces()
    other = Store.create(tmp_path / "other").create_space(space.identity)
    for segment in space.segments():
        read = segment.read(list(segment.states), list(segment.columns))
        for state in read.states.values():
            np.add(state.values, 0.01, out=state.values, casting="unsafe")
        writer = other.writer({})
        writer.add(read)
        writer.seal()
    opened = Store(other.files)
    digest = space.identity["weights"]
    source = Store.open(store)
    config = source.load_json(digest, "config.json")
    opened.save_weights(digest, {"config.json": config, "source.json": {"names": ["x"]}})
    assert np.all([not p for p in opened.verify(deep=True)])
    options = ["--recompute", 3, "--store", tmp_path / "other", "--model", checkpoints["bert"]]
    result = run("store", "verify", "--deep", *options)
    assert result.exit_code == 1 and "encoder." in result.stderr


DAMAGES = ["chunk", "array metadata", "group metadata", "manifest", "column", "space", "store", "table", "weights"]


@pytest.mark.parametrize("damage", [*DAMAGES, "missing"])
def test_repair_and_the_next_extract_fills_the_hole(copied: tuple[Path, list[Any]], damage: str) -> None:
    store, extract = copied
    expected = content(store)
    segments = "spaces/*/segments/*"
    file = {
        "chunk": f"{segments}/encoder.3/c.0.0",
        "array metadata": f"{segments}/encoder.3/zarr.json",
        "group metadata": f"{segments}/zarr.json",
        "manifest": f"{segments}/manifest.json",
        "column": f"{segments}/encoder.ids/c.0",
        "space": "spaces/*/space.json",
        "store": "store.json",
        "table": "spaces/*/tasks/*/train*",
        "weights": "weights/*/tail.safetensors",
        "missing": f"{segments}/encoder.3/c.0.0",
    }[damage]
    victim = first(store, file)
    victim.unlink() if damage == "missing" else victim.write_bytes(victim.read_bytes()[:-9] + b"?" * 9)
    dry = ok("store", "repair", "--dry-run", "--store", store)
    assert len(dry["problems"]) == 1 and not dry["moved"]
    done = ok("store", "repair", "--store", store)
    assert done["moved"]
    result = ok(*extract)
    # A damaged chunk costs the samples in it; metadata and what is not of a segment cost none.
    if damage in ("array metadata", "group metadata", "space", "store", "table", "weights"):
        assert result["computed"] == 0
    else:
        assert result["computed"] == len(expected)
    assert run("store", "verify", "--deep", "--store", store).exit_code == 0
    _segment.cache_clear()
    assert content(store) == expected
    assert ok(*extract)["computed"] == 0


def test_compact_and_gc(copied: tuple[Path, list[Any]], tmp_path: Path) -> None:
    """Two writers' duplicates, and a supplement, become one; gc removes the rest only when asked."""
    store, extract = copied
    expected = content(store)
    double = tmp_path / "double"
    ok(*extract[:-2], "--store", double)
    ok("store", "merge", double, "--store", store)
    (space,) = Store.open(store).spaces()
    assert sum(len(s) for s in space.segments()) == 2 * len(expected)
    assert ok(*extract)["computed"] == 0
    (done,) = ok("store", "compact", "--store", store).values()
    assert done["samples"] == len(expected)
    (space,) = Store.open(store).spaces()
    assert sum(len(s) for s in space.segments()) == len(expected)
    assert content(store) == expected
    assert ok("store", "compact", "--store", store)[space.id]["old"] == 0
    assert not ok("store", "gc", "--store", store)["found"]
    found = ok("store", "gc", "--older-than", "0s", "--store", store)["found"]
    assert {f["why"] for f in found} >= {"written anew"} and len(list(store.glob("spaces/*/segments/*"))) == 3
    ok("store", "gc", "--older-than", "0s", "--delete", "--store", store)
    assert len(list(store.glob("spaces/*/segments/*"))) == 1 and content(store) == expected
    assert ok(*extract)["computed"] == 0
    assert run("store", "verify", "--deep", "--store", store).exit_code == 0


def test_rm_asks(copied: tuple[Path, list[Any]]) -> None:
    store, extract = copied
    (space,) = Store.open(store).spaces()
    assert run("store", "rm", space.id[:8], "--store", store).exit_code != 0 and Store.open(store).spaces()
    ok("store", "rm", space.id[:8], "--yes", "--store", store)
    assert not Store.open(store).spaces()
    assert {f["why"] for f in ok("store", "gc", "--older-than", "0", "--store", store)["found"]} == {
        "weights of no feature space"
    }
    assert ok(*extract)["computed"]


def test_bad_input_is_one_line(copied: tuple[Path, list[Any]], tmp_path: Path) -> None:
    store, _ = copied
    refused(run("store", "gc", "--older-than", "soon", "--store", store), "soon")
    refused(run("store", "push", "ftp://x/y", "--store", store), "ftp")
    refused(run("store", "merge", store, "--store", store), "same store")
    refused(run("store", "rm", "ffff", "--yes", "--store", store), "ffff")
    refused(run("store", "share", "no-such-group", "--store", store), "no-such-group")
    refused(run("store", "status", "--store", tmp_path / "none"), "no store")


def test_train_from_bucket_and_mirror_gives_the_same_losses(
    whole: tuple[Path, list[Any]], tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    options = ["--task", table, "--tuner", "lst", "--reduction", 4, "--epochs", 2, "--batch-size", 16]

    def losses(place: object, out: str) -> list[float]:
        result = run("train", *options, "--store", place, "--out", tmp_path / out)
        assert result.exit_code == 0, result.output
        lines = (tmp_path / out / "log.jsonl").read_text().splitlines()
        return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]

    local = losses(whole[0], "local")
    with servers.http_server(whole[0].parent, tmp_path / "nginx") as url:
        assert losses(f"{url}/store", "http") == local
    with servers.s3(tmp_path / "s3") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert ok("store", "push", "s3://team/features", "--store", whole[0])["segments"] == 1
        assert losses("s3://team/features", "s3") == local
        result = run("store", "status", "--store", "s3://team/features")
        for secret in (environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]):
            assert secret not in result.output
            assert not [p for p in tmp_path.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


def test_further_tuners_store_only_what_was_missing(whole: tuple[Path, list[Any]], tmp_path: Path, table: Path) -> None:
    """SHERL's states, then LST's, then all layers: supplements; each tuner trains as from a store made at once."""
    extract = list(whole[1])
    at = extract.index("--for") + 1
    extract += ["--store", tmp_path / "grown"]

    def grow(*more: Any) -> set[str]:
        before = set(stored())
        result = ok(*extract[:at], *more, *extract[at + 1 :])
        assert result["computed"] in (0, len(Store.open(tmp_path / "grown").spaces()[0].stored()))
        return set(stored()) - before

    def stored() -> list[str]:
        """Every state of every segment; a state that stands in two is listed twice."""
        spaces = Store.open(tmp_path / "grown").spaces() if (tmp_path / "grown").exists() else []
        return [name for space in spaces for segment in space.segments() for name in segment.states]

    assert grow("sherl")
    grow("lst")
    grow("lst,sherl", "--layers", "0,1,2,3")
    assert len(stored()) == len(set(stored())), "a state was stored twice"
    ok(*extract[:at], "lst,sherl", *extract[at + 1 : -1], tmp_path / "once")
    options = ["--task", table, "--reduction", 4, "--epochs", 1, "--batch-size", 16]
    for tuner in ("lst", "sherl"):
        logs = []
        for store in ("grown", "once"):
            out = tmp_path / f"{tuner}-{store}"
            assert run("train", *options, "--tuner", tuner, "--store", tmp_path / store, "--out", out).exit_code == 0
            logs.append([json.loads(line).get("loss") for line in (out / "log.jsonl").read_text().splitlines()])
        assert logs[0] == logs[1]


def test_a_shared_group_may_write(whole: tuple[Path, list[Any]], tmp_path: Path) -> None:
    import grp
    import os

    group = grp.getgrgid(os.getgid()).gr_name
    store = tmp_path / "shared"
    old = os.umask(0o077)
    try:
        ok("store", "share", group, "--store", store)
        ok("store", "merge", whole[0], "--store", store)
    finally:
        os.umask(old)
    for path in store.rglob("*"):
        wanted = 0o2070 if path.is_dir() else 0o060
        assert path.stat().st_mode & wanted == wanted, path


def test_a_bucket_is_mended_as_verify_says(
    copied: tuple[Path, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage behind a warm cache is found; a push alone leaves it; what `verify` prints, pasted, mends it."""
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    with servers.s3(tmp_path / "s3") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        there = ["--store", "s3://team/features"]
        push = ["store", "push", "s3://team/features", "--store", copied[0]]
        ok(*push)
        train = ["train", "--task", copied[1][4], "--tuner", "lst", "--reduction", 4, "--epochs", 1, *there]
        assert run(*train, "--out", tmp_path / "run").exit_code == 0
        (victim, *_) = sorted((tmp_path / "s3").rglob("segments/*/*/c.0.0"))
        data = victim.read_bytes()
        victim.write_bytes(data[:-8] + bytes(b ^ 1 for b in data[-8:]))
        again = run(*push)
        assert again.exit_code == 0 and "store verify --deep --store s3://team/features" in again.stdout
        said = run("store", "verify", "--deep", *there)
        assert said.exit_code == 1 and victim.parent.name in said.stderr
        mend, bring = re.findall(r"`pipeline ([^`]*)`", said.stderr.splitlines()[-1])
        assert run(*mend.split()).exit_code == 0
        assert run(*bring.replace("COPY", str(copied[0])).split()).exit_code == 0
        assert ok("store", "verify", "--deep", *there)["problems"] == []
