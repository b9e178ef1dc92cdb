"""Writing and reading segments: round trips, supplements, kills, full disks."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.extract.encoding import encode
from pipeline.store import FORMATS, Encoded, Samples, StoreError
from pipeline.store.files.local import Files
from pipeline.store.format import names as store_names
from pipeline.store.format.document import dump_document, load_document
from pipeline.store.segments.alive import _started, describe_writer, is_dead
from pipeline.store.segments.writer import SegmentWriter
from tests.store.helpers import assert_equal, key, samples, sealed, snapshot, space


@pytest.mark.parametrize("fmt", FORMATS)
def test_round_trip(tmp_path: Path, fmt: str) -> None:
    home = space(tmp_path, format=fmt)
    expected = samples(list(range(20)), fmt=fmt)
    writer = home.writer({"dataset": "none"})
    assert writer.age == 0 and writer.samples == 0
    writer.add(expected)
    assert (writer.samples, writer.nbytes) == (20, expected.nbytes) and writer.age > 0
    segment = writer.seal()
    assert (writer.samples, writer.nbytes, writer.age) == (0, 0, 0)
    assert_equal(segment.read(["encoder.3", "decoder.1"], ["encoder.ids", "decoder.ids"]), expected)
    (again,) = space(tmp_path, format=fmt).segments()
    assert again.provenance == {"dataset": "none"} and again.base is None and len(again) == 20
    assert again.verify(deep=True) == []
    assert sorted(p.name for p in again.path.iterdir() if p.is_file()) == ["manifest.json", "zarr.json"]


@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=12),
    batches=st.integers(1, 4),
    fmt=st.sampled_from(FORMATS),
    width=st.integers(1, 5),
    chunk=st.integers(8, 200),
    data=st.data(),
)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_runs_of_any_samples(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    batches: int,
    fmt: str,
    width: int,
    chunk: int,
    data: st.DataObject,
) -> None:
    """Whatever the chunking, any runs of samples come back as they were put in, and zarr reads the same."""
    rows = sum(lengths)
    x = encode(torch.arange(rows * width, dtype=torch.float32).reshape(rows, width) * 997, fmt).numpy()
    ids = np.arange(rows, dtype=np.int32)
    keys = [key(i) for i in range(len(lengths))]
    whole = Samples(keys, {"encoder": np.array(lengths, np.int64)}, {"encoder.0": x}, {"encoder.ids": ids})
    home = space(tmp_path_factory.mktemp("s"), format=fmt)
    writer = home.writer({})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.store.format.arrays.CHUNK_BYTES", chunk)
        for part in np.array_split(np.arange(len(lengths)), batches):
            if len(part):
                writer.add(_cut(whole, int(part[0]), int(part[-1]) + 1))
        segment = writer.seal()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(lengths)), min_size=0, max_size=6, unique=True)))
    runs = list(zip(cuts[::2], cuts[1::2], strict=False))
    found = segment.read(["encoder.0"], ["encoder.ids"], runs)
    wanted = [i for a, b in runs for i in range(a, b)]
    offsets = whole.offsets("encoder")
    where = np.array([r for i in wanted for r in range(offsets[i], offsets[i + 1])], np.int64)
    assert found.keys == [keys[i] for i in wanted]
    assert found.lengths["encoder"].tolist() == [lengths[i] for i in wanted]
    assert np.array_equal(found.states["encoder.0"].values, x.take(where).values)
    assert found.columns["encoder.ids"].tolist() == where.tolist()
    _assert_zarr_reads_the_same(segment.path, x)


def _cut(whole: Samples, start: int, stop: int) -> Samples:
    a, b = whole.offsets("encoder")[[start, stop]]
    return Samples(
        whole.keys[start:stop],
        {"encoder": whole.lengths["encoder"][start:stop]},
        {"encoder.0": whole.states["encoder.0"].take(np.arange(a, b))},
        {"encoder.ids": whole.columns["encoder.ids"][a:b]},
    )


def _assert_zarr_reads_the_same(path: Path, x: Encoded) -> None:
    group = zarr.open_group(str(path), mode="r")
    values = np.asarray(group["encoder.0"])
    expected = x.values.view(np.uint16) if x.format == "bfloat16" else x.values
    assert values.dtype == expected.dtype and np.array_equal(values, expected)


def test_chunks_waste_no_space(tmp_path: Path) -> None:
    """Zarr pads the last chunk: the size must stay that of the rows, to a fraction of a per cent."""
    x = encode(torch.randn(20_001, 520), "float16").numpy()
    home = space(tmp_path)
    writer = home.writer({})
    writer.add(Samples([key(0)], {"encoder": np.array([20_001])}, {"encoder.0": x}))
    segment = writer.seal()
    assert segment.arrays["encoder.0"].chunks > 1
    assert segment.nbytes < x.nbytes * 1.001 + 5000


def test_metadata_is_what_zarr_consolidates(tmp_path: Path) -> None:
    segment = sealed(space(tmp_path), [1, 2, 3])
    ours = json.loads((segment.path / "zarr.json").read_text())
    group = zarr.open_group(str(segment.path), mode="r")
    assert group.metadata.consolidated_metadata is not None and sorted(group.array_keys()) == sorted(segment.arrays)
    with pytest.warns(UserWarning):
        zarr.consolidate_metadata(str(segment.path))
    assert json.loads((segment.path / "zarr.json").read_text()) == ours


def test_states_without_scale_join_states_with_one(tmp_path: Path) -> None:
    home = space(tmp_path)
    writer = home.writer({})
    small, large = samples([1, 2], large=False), samples([3, 6])
    assert small.states["encoder.3"].scale is None and large.states["encoder.3"].scale is not None
    writer.add(small)
    writer.add(large)
    segment = writer.seal()
    assert segment.states["encoder.3"].scale
    assert_equal(segment.read(["encoder.3"], (), [(0, 2)]), _only(samples([1, 2], large=False), "encoder.3"))
    assert_equal(segment.read(["encoder.3"], (), [(2, 4)]), _only(large, "encoder.3"))


def _only(whole: Samples, state: str) -> Samples:
    return Samples(whole.keys, whole.lengths, {state: whole.states[state]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.keys.__setitem__(0, "../../etc"), "32 lower hex"),
        (lambda s: s.lengths.__setitem__("encoder", s.lengths["encoder"] + 1), "rows, its stream has"),
        (lambda s: s.states.__setitem__("encoder.lengths", s.states["encoder.3"]), "does not name a state"),
        (lambda s: s.states.__setitem__("other.3", s.states["encoder.3"]), "does not name a state"),
        (lambda s: s.columns.__setitem__("encoder.ids", s.columns["encoder.ids"].astype(np.int64)), "int32"),
        (lambda s: s.keys.__setitem__(0, s.keys[1]), "twice"),
        (lambda s: s.states.__setitem__("encoder.3", encode(torch.zeros(2, 8), "int8").numpy()), "rows, its stream"),
    ],
)
def test_writer_refuses_what_does_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    wrong = samples([1, 2, 3])
    change(wrong)
    with pytest.raises(ValueError, match=message):
        space(tmp_path).writer({}).add(wrong)


def test_writer_refuses_other_states_formats_and_repeats(tmp_path: Path) -> None:
    writer = space(tmp_path).writer({})
    writer.add(samples([1, 2]))
    with pytest.raises(ValueError, match="twice"):
        writer.add(samples([2]))
    with pytest.raises(ValueError, match="those added before"):
        writer.add(samples([3], states=("encoder.3",)))
    with pytest.raises(ValueError, match="this feature space holds float16"):
        writer.add(samples([3], fmt="int8"))
    with pytest.raises(ValueError, match="nothing to seal"):
        space(tmp_path).writer({}).seal()


def test_supplement(tmp_path: Path) -> None:
    home = space(tmp_path)
    numbers = list(range(10))
    base = sealed(home, numbers)
    extra = sealed(home, numbers, base, states=("encoder.5", "decoder.1"), columns=False)
    assert extra.base == base.id and home.segments()[1].base == base.id
    with pytest.raises(ValueError, match="same order"):
        sealed(home, numbers[::-1], base)
    with pytest.raises(ValueError, match="itself a supplement"):
        home.writer({}, extra)
    other = samples(numbers, states=("encoder.7",), columns=False)
    other.lengths["encoder"] = other.lengths["encoder"][::-1].copy()
    writer = home.writer({}, base)
    writer.add(other)
    with pytest.raises(StoreError, match="lengths of stream encoder differ"):
        writer.seal()


class Killed(BaseException):
    """Stands for SIGKILL: with `_undo` switched off nothing cleans up."""


def _operations(patch: pytest.MonkeyPatch, stop_at: int, error: BaseException) -> None:
    """Let file operation number `stop_at` fail, half done."""
    count = [0]
    for name in ("make", "write", "sync", "publish"):
        original = getattr(Files, name)

        def step(self: Files, *args: Any, _original: Any = original) -> Any:
            count[0] += 1
            if count[0] == stop_at:
                raise error
            return _original(self, *args)

        patch.setattr(Files, name, step)


def test_a_kill_at_any_moment_is_invisible_and_swept(tmp_path: Path) -> None:
    home = space(tmp_path)
    first = sealed(home, [1, 2])
    for stop_at in range(1, 60):
        writer = home.writer({})
        writer.add(samples([3, 4]))
        with pytest.MonkeyPatch.context() as patch:
            _operations(patch, stop_at, Killed())
            patch.setattr(SegmentWriter, "_undo", lambda self, folder: None)
            try:
                writer.seal()
            except Killed:
                pass
            else:
                break
    else:
        raise AssertionError("sealing takes more steps than were tried")
    segments, folders = home.segments(), list((home.path / "segments").iterdir())
    for segment in segments[1:]:
        # The last one was not killed, the others after the rename: then they are whole.
        assert_equal(segment.read(["encoder.3", "decoder.1"], ["encoder.ids", "decoder.ids"]), samples([3, 4]))
    visible = {segment.id for segment in segments}
    # The first operation makes the folder; from the third kill on, writer.json is there.
    assert stop_at > 10 and first.id in visible and len(folders) == stop_at and len(visible) <= 5
    assert home.sweep() == 0, "a living writer's segments are not garbage"
    hidden = [folder for folder in folders if folder.name not in visible]
    signed = [folder for folder in hidden if (folder / "writer.json").exists()]
    for folder in signed:
        _make_writer_dead(folder / "writer.json")
    assert home.sweep() == len(signed) > 5
    for folder in hidden:
        if folder not in signed:
            assert not any(folder.iterdir())
            os.utime(folder, (0, 0))
    assert home.sweep() == len(hidden) - len(signed)
    assert {f.name for f in (home.path / "segments").iterdir()} == visible == {s.id for s in home.segments()}


def _make_writer_dead(path: Path) -> None:
    writer = load_document(path.read_bytes(), "writer", "activation-writer")
    path.write_bytes(dump_document({**writer, "started": 1}))


def test_writers_of_other_hosts_are_left_alone(tmp_path: Path) -> None:
    mine = describe_writer()
    assert not is_dead(mine)
    assert is_dead({**mine, "started": 1})
    assert not is_dead({**mine, "host": "elsewhere", "started": 1})
    assert not is_dead({"host": mine["host"]}) and not is_dead({})
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    theirs = {**mine, "pid": child.pid, "started": _started(child.pid)}
    assert not is_dead(theirs)
    child.communicate(b"\n")
    assert is_dead(theirs)


def test_sigkill_of_a_real_writer(tmp_path: Path) -> None:
    home = space(tmp_path)
    before = sealed(home, [1, 2])
    code = (
        "import os, signal, sys; from pathlib import Path; from tests.store.helpers import *\n"
        "from pipeline.store.files.local import Files\n"
        "original = Files.sync\n"
        "def sync(self, names):\n"
        "    names = list(names)\n"
        "    if len(names) > 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    original(self, names)\n"
        "Files.sync = sync\n"
        "sealed(space(Path(sys.argv[1])), [3, 4])\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]
    assert [s.id for s in home.segments()] == [before.id]
    assert len(list((home.path / "segments").iterdir())) == 2
    assert home.sweep() == 1 and home.sweep() == 0
    assert len(list((home.path / "segments").iterdir())) == 1


def test_full_disk_leaves_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    home = space(tmp_path)
    sealed(home, [1, 2])
    before = {name: size for name, (size, _) in snapshot(home.path).items()}
    writer = home.writer({})
    writer.add(samples([3, 4]))
    for stop_at in range(1, 60):
        with pytest.MonkeyPatch.context() as patch:
            _operations(patch, stop_at, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            try:
                segment = writer.seal()
            except StoreError as error:
                assert "disk full" in str(error) and "MB needed" in str(error) and "\n" not in str(error)
                assert {name: size for name, (size, _) in snapshot(home.path).items()} == before, stop_at
            else:
                break
    assert_equal(segment.read(["encoder.3", "decoder.1"], ["encoder.ids", "decoder.ids"]), samples([3, 4]))


def test_interrupt_while_sealing_cleans_up(tmp_path: Path) -> None:
    home = space(tmp_path)
    writer = home.writer({})
    writer.add(samples([3, 4]))
    with pytest.MonkeyPatch.context() as patch:
        _operations(patch, 8, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            writer.seal()
    assert list((home.path / "segments").iterdir()) == []


def test_an_oversized_manifest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = space(tmp_path)
    writer = home.writer({})
    writer.add(samples(list(range(50))))
    monkeypatch.setattr("pipeline.store.segments.writer.MAX_JSON", 1000)
    with pytest.raises(StoreError, match="seal earlier"):
        writer.seal()
    assert home.segments() == [] and store_names.MAX_JSON > 1 << 20


def test_manifest_lists_every_file(tmp_path: Path) -> None:
    segment = sealed(space(tmp_path), [1, 2, 3])
    document = json.loads((segment.path / "manifest.json").read_text())
    listed = {entry["name"]: entry["size"] for entry in document["files"]}
    there = {p.relative_to(segment.path).as_posix(): p.stat().st_size for p in segment.path.rglob("*") if p.is_file()}
    del there["manifest.json"]
    assert listed == there
    assert "<" not in document["created"] and document["space"] == space(tmp_path).id


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc here: what is synced when not tested")
def test_all_is_on_the_disk_before_the_seal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder, then the manifest under another name, then its rename, then the folder that holds it."""
    home = space(tmp_path)
    done: list[tuple[str, Path]] = []
    replace = Path.replace

    def renamed(self: Path, target: Path) -> Path:
        done.append(("renamed", Path(target)))
        return replace(self, target)

    monkeypatch.setattr("os.fsync", lambda fd: done.append(("synced", Path(f"/proc/self/fd/{fd}").readlink())))
    monkeypatch.setattr(Path, "replace", renamed)
    segment = sealed(home, [1, 2])
    seal = done.index(("renamed", segment.path / "manifest.json"))
    before = {path for what, path in done[:seal] if what == "synced"}
    files = {segment.path / name for name in segment.contents}
    assert files | {path.parent for path in files} | {segment.path} <= before
    assert [path.name.startswith(".manifest.json") for _, path in done[seal - 1 : seal]] == [True]
    assert ("synced", segment.path) in done[seal:]
