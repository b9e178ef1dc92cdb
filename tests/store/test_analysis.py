"""A state of a whole space as a lazy Dask array, and sample by sample: for analysis, whatever the space's size."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.extract.encoding import encode
from pipeline.store import Space, StoreError
from pipeline.store.errors import MissingStates
from pipeline.store.segments.analysis import rows_of_state
from tests.store.helpers import key, samples, sealed, space

STATE = "encoder.3"


@pytest.fixture
def home(tmp_path: Path) -> Space:
    """Four segments; one sample stands twice, one segment has the state in a supplement, one lacks it."""
    home = space(tmp_path)
    sealed(home, list(range(10)))
    base = sealed(home, list(range(10, 20)), states=("decoder.1",))
    sealed(home, list(range(10, 20)), base, states=(STATE,), columns=False)
    sealed(home, [5, *range(20, 30)])
    sealed(home, list(range(30, 34)), states=("decoder.1",))
    return home


def plain(numbers: list[int]) -> dict[str, np.ndarray]:
    """What was stored of `numbers`, read segment by segment."""
    found = {}
    for n in numbers:
        one = samples([n], (STATE,)).states[STATE]
        scale = 1.0 if one.scale is None else np.exp2(np.asarray(one.scale, np.float32))[:, None]
        found[key(n)] = np.asarray(one.values, np.float32) * scale
    return found


@pytest.mark.parametrize("block_bytes", [1, 200, 1 << 25])
def test_the_array_and_the_samples_are_what_is_stored(home, block_bytes):
    expected = plain(list(range(30)))
    found = dict(home.samples(STATE, block_bytes=block_bytes))
    assert found.keys() == expected.keys() and len(list(home.samples(STATE))) == 30
    for name, rows in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], rows)
    array = home.to_dask(STATE, block_bytes=block_bytes)
    whole = np.concatenate(list(found.values()))
    assert array.shape == whole.shape and array.dtype == np.float32
    np.testing.assert_array_equal(array.compute(), whole)


def test_sums_are_those_of_a_plain_loop(home):
    total, rows = np.zeros(8), 0
    for values in plain(list(range(30))).values():
        total += values.sum(0, dtype=np.float64)
        rows += len(values)
    array = home.to_dask(STATE, block_bytes=200)
    assert array.npartitions == 6
    np.testing.assert_allclose(array.sum(0, dtype="float64").compute(), total, rtol=1e-12)
    np.testing.assert_allclose(array.mean(0, dtype="float64").compute(), total / rows, rtol=1e-12)


def test_slices_are_those_of_numpy_and_read_only_their_blocks(home, monkeypatch):
    from pipeline.store.segments import analysis

    read = []
    original = analysis.read_block
    monkeypatch.setattr(analysis, "read_block", lambda block: (read.append(block), original(block))[1])
    array = home.to_dask(STATE, block_bytes=200)
    assert not read, "lazy"
    whole = array.compute(scheduler="synchronous")
    assert len(read) == array.npartitions
    for index in (np.s_[3:9], np.s_[::3, 2:5], (7,), (-1, 2), np.s_[20:3:-2], np.s_[4:4], np.s_[:, 0]):
        read.clear()
        np.testing.assert_array_equal(array[index].compute(scheduler="synchronous"), whole[index])
        if index == (7,):
            assert len(read) == 1


def test_what_dask_is_given_is_sliced_as_an_array_is(home):
    """Within a block and across blocks: Dask itself asks for one whole block at a time."""
    rows = rows_of_state(home, STATE, None, 200, "float32")
    whole = rows[:]
    np.testing.assert_array_equal(whole, home.to_dask(STATE).compute())
    inner = rows.ends[1:-1].tolist()
    assert len(inner) > 3
    for low in (0, 1, inner[0] - 1, inner[0], inner[1] + 1):
        for high in (low + 1, inner[2], inner[2] + 1, len(whole)):
            np.testing.assert_array_equal(rows[low:high], whole[low:high])
            np.testing.assert_array_equal(rows[low:high:3, 1], whole[low:high:3, 1])
    for index in (5, -1, np.s_[-2, 3], np.s_[9:2:-2], np.s_[4:4], np.s_[:, 2:4]):
        np.testing.assert_array_equal(rows[index], whole[index])


def test_some_samples(home):
    wanted = [key(n) for n in (12, 3, 25, 3)]
    expected = plain([12, 3, 25])
    found = dict(home.samples(STATE, wanted))
    assert found.keys() == expected.keys()
    rows = home.to_dask(STATE, wanted, dtype="float64").compute()
    assert rows.dtype == np.float64 and len(rows) == sum(map(len, expected.values()))
    with pytest.raises(MissingStates, match=r"encoder\.3 not stored for 1 of 2"):
        home.to_dask(STATE, [key(1), key(31)])


@pytest.mark.parametrize("state", ["encoder.9", "encoder.ids", "nonsense"])
def test_a_state_that_is_not_there(home, state):
    with pytest.raises(MissingStates, match="store status"):
        home.to_dask(state)


def test_damage_is_found_when_it_is_computed(home):
    array = home.to_dask(STATE)
    chunk = next(home.segments()[0].path.glob(f"{STATE}/c.0*"))
    data = bytearray(chunk.read_bytes())
    data[0] ^= 1
    chunk.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=STATE):
        array.compute(scheduler="synchronous")


@pytest.mark.parametrize("fmt", ["float32", "bfloat16", "float16", "int8"])
def test_every_number_format(tmp_path, fmt):
    home = space(tmp_path, format=fmt)
    sealed(home, [1, 2, 4], states=(STATE,), fmt=fmt)
    rows = home.to_dask(STATE).compute()
    exact = [samples([n], (STATE,), "float32").states[STATE].values for n in (1, 2, 4)]
    exact = np.concatenate([np.asarray(x) for x in exact])
    np.testing.assert_allclose(rows, exact, rtol=2**-7, atol=np.abs(exact).max() / 200)


def test_the_workers_of_a_cluster_compute_it(home):
    distributed = pytest.importorskip("distributed")
    array = home.to_dask(STATE, block_bytes=200)
    assert len(pickle.dumps(home)) < 1000 and pickle.loads(pickle.dumps(home)).id == home.id
    again = home.to_dask(STATE, block_bytes=200)
    assert array.name == again.name, "equal arrays are computed once"
    one = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**one) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        total = client.compute(array.sum(0)).result()
    np.testing.assert_allclose(total, array.compute().sum(0), rtol=1e-5)


LIMITED = """
import resource, sys
from pathlib import Path
import dask, dask.array as da, numpy as np
from pipeline.store import Store

dask.config.set(scheduler="synchronous")
space = Store.open(sys.argv[1]).spaces()[0]
x = space.to_dask("encoder.3", block_bytes=1 << 20)
x[:8].compute(), np.linalg.eigh(np.eye(x.shape[1]))  # whatever is loaded at the first use is loaded now
held = int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmData")).split()[1])
room = x.nbytes // 2
resource.setrlimit(resource.RLIMIT_DATA, (held * 1024 + room, resource.RLIM_INFINITY))
mean, second = dask.compute(x.mean(0, dtype="float64"), x.T @ x / len(x))
values, vectors = np.linalg.eigh(second - np.outer(mean, mean))
np.savez(sys.argv[2], values=values[::-1][:4], vectors=vectors[:, ::-1][:, :4], rows=len(x))
try:
    x.compute()
except (MemoryError, RuntimeError):  # NumPy, torch
    print("too large")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_a_pca_over_more_than_memory_ends(tmp_path):
    """32 MB of float32 rows with half of that allowed beyond what the interpreter holds."""
    home, width, each = space(tmp_path), 128, 8192
    draws = np.random.default_rng(0)
    spread = np.concatenate([[9.0, 6.0, 4.0, 3.0], np.ones(width - 4)])
    total, second, rows = np.zeros(width), np.zeros((width, width)), 0
    for number in range(8):
        x = (draws.standard_normal((each, width)) * spread + 1).astype(np.float32)
        part = samples(list(range(number * 64, number * 64 + 64)), (STATE,), columns=False)
        part.lengths["encoder"] = np.full(64, each // 64)
        part.states[STATE] = encode(torch.from_numpy(x), "float16").numpy()
        writer = home.writer({})
        writer.add(part)
        writer.seal()
        x = x.astype(np.float16).astype(np.float64)
        total, second, rows = total + x.sum(0), second + x.T @ x, rows + each
    out = tmp_path / "pca.npz"
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "store"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "too large", "the limit limits nothing"
    found, mean = np.load(out), total / rows
    values, vectors = np.linalg.eigh(second / rows - np.outer(mean, mean))
    assert found["rows"] == rows
    np.testing.assert_allclose(found["values"], values[::-1][:4], rtol=1e-3)
    assert np.abs((found["vectors"] * vectors[:, ::-1][:, :4]).sum(0)).min() > 0.999
