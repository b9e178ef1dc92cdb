"""The stream against a plain read of the same bytes and against other loaders, in one run on the same tensors.

    python tests/benchmarks/loaders.py [--samples 800] [--batch-size 32] [--rounds 3] [--folder FOLDER]

Samples of RTE's lengths, nine states of width 768 as float16: what SHERL reads of a T5-base encoder. Every loader hands
out the same shuffled batches: the rows of its samples packed, state by state, in float32. `warm`: from the page cache;
`cold`: after the files were dropped from it. Best of the rounds, the loaders taking turns. Loaders that are not
installed are left out and named (`pip install litdata mosaicml-streaming`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.report import table_text
from store import Samples, Store, digest_bytes, encode, read_block
from store.malloc import keep_freed_memory
from tests.benchmarks import results
from train.stream import StoreSource

STATES, WIDTH = [f"encoder.{i}" for i in (1, 2, 3, 5, 6, 7, 9, 10, 11)], 768
KEPT = "our shuffled batches, host tier"  # what has been read stays, so that nothing is cold
Loader = Callable[[], Iterator[int]]  # one epoch; yields the samples of each batch


def make(count: int, folder: Path) -> tuple[Any, list[str], np.ndarray]:
    """A store of `count` samples in segments of about 128 MB; its space, keys and lengths."""
    space = Store.create(folder / "store").create_space({"format": "float16"})
    g = np.random.default_rng(0)
    lengths = np.clip(g.lognormal(4.2, 0.5, count).astype(np.int64), 16, 128)
    keys = [digest_bytes(str(i).encode()) for i in range(count)]
    step = max(1, int((128 << 20) / (len(STATES) * WIDTH * 2 * lengths.mean())))
    for a in range(0, count, step):
        part = slice(a, min(a + step, count))
        rows = int(lengths[part].sum())
        states = {name: encode(torch.randn(rows, WIDTH), "float16") for name in STATES}
        writer = space.writer({})
        writer.add(Samples(keys[part], {"encoder": lengths[part]}, states))
        writer.seal()
    return space, keys, lengths


def chunk_files(space: Any) -> list[Path]:
    return [f for s in space.segments() for name in STATES for f in sorted((s.path / name).glob("c.*"))]


def ours(space: Any, keys: list[str], batch: int, tier: str) -> Loader:
    source = StoreSource(space, keys, None, STATES, batch_size=batch, tier=tier)
    epochs = iter(range(1 << 30))

    def run() -> Iterator[int]:
        for item in source.epoch(next(epochs)):
            yield len(item)

    return run


def packed(samples: Iterable[np.ndarray]) -> dict[str, Tensor]:
    """Samples (states, rows, width) → each state's rows back to back in float32: what our stream hands out."""
    whole = torch.from_numpy(np.concatenate(list(samples), axis=1))
    return {name: whole[i].float() for i, name in enumerate(STATES)}


def through_zarr(space: Any, keys: list[str], lengths: np.ndarray, batch: int) -> Loader:
    """zarr-python alone, a thread pool, no Dask: a segment a task, shuffled within, two in flight."""
    segments = [zarr.open_group(str(s.path), mode="r") for s in space.segments()]
    sizes = [len(s) for s in space.segments()]
    place = {key: i for i, key in enumerate(keys)}
    known = [[place[k] for k in s.keys] for s in space.segments()]

    def read(number: int) -> list[np.ndarray]:
        with zarr.config.set({"async.concurrency": 4}):
            rows = np.stack([np.asarray(segments[number][name][:]) for name in STATES])
        return np.split(rows, np.cumsum([lengths[i] for i in known[number]])[:-1], axis=1)

    g = np.random.default_rng(0)

    def run() -> Iterator[int]:
        order = g.permutation(len(segments))
        with ThreadPoolExecutor(2) as pool:
            for number, samples in zip(order, pool.map(read, order), strict=True):
                pick = g.permutation(sizes[number])
                for a in range(0, len(pick), batch):
                    packed(samples[i] for i in pick[a : a + batch])
                    yield len(pick[a : a + batch])

    return run


class Files(Dataset[np.ndarray]):
    """A `torch.save` file a sample."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> np.ndarray:
        return torch.load(self.folder / f"{i}.pt", weights_only=True).numpy()  # type: ignore[no-any-return]


class Rows(Dataset[np.ndarray]):
    """Anything indexable whose items hold the bytes of a sample."""

    def __init__(self, source: Any, field: str) -> None:
        self.source, self.field = source, field

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> np.ndarray:
        return as_sample(self.source[i][self.field])


def as_sample(raw: Any) -> np.ndarray:
    flat = np.frombuffer(raw, np.float16) if isinstance(raw, bytes) else np.asarray(raw, np.float16)
    return flat.reshape(len(STATES), -1, WIDTH)


def torch_loader(data: Dataset[np.ndarray], batch: int, workers: int, shuffle: bool = True) -> Loader:
    def run() -> Iterator[int]:
        context = "fork" if workers else None
        loader = DataLoader(
            data, batch, shuffle=shuffle, num_workers=workers, collate_fn=packed, multiprocessing_context=context
        )
        for item in loader:
            yield 0 if item is None else 1

    return run


def others(space: Any, keys: list[str], lengths: np.ndarray, batch: int, folder: Path) -> dict[str, Loader]:
    """The same samples, one after the other, in each of the other forms."""
    place = {key: i for i, key in enumerate(keys)}
    samples: list[np.ndarray] = [np.zeros(0)] * len(keys)
    for segment in space.segments():
        read = segment.read(STATES)
        rows = np.stack([read.states[name].values.numpy() for name in STATES])
        for key, part in zip(read.keys, np.split(rows, np.cumsum(read.lengths["encoder"])[:-1], axis=1), strict=True):
            samples[place[key]] = np.ascontiguousarray(part)
    found: dict[str, Loader] = {"zarr, thread pool": through_zarr(space, keys, lengths, batch)}
    (folder / "pt").mkdir()
    for i, sample in enumerate(samples):
        torch.save(torch.from_numpy(sample), folder / "pt" / f"{i}.pt")
    for workers in (0, 2):
        found[f"torch.save files, {workers} workers"] = torch_loader(Files(folder / "pt", len(keys)), batch, workers)
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"x": datasets.Value("large_binary")})
    made = datasets.Dataset.from_generator(
        lambda: ({"x": s.tobytes()} for s in samples), features=features, cache_dir=str(folder / "arrow")
    )
    for workers in (0, 2):
        found[f"datasets (Arrow), {workers} workers"] = torch_loader(Rows(made, "x"), batch, workers)
    for name, maker in (("MosaicML Streaming", mosaic), ("LitData", lit)):
        try:
            found |= maker(samples, batch, folder)
        except ImportError:
            print(f"{name}: not installed, left out", flush=True)
    return found


def mosaic(samples: list[np.ndarray], batch: int, folder: Path) -> dict[str, Loader]:
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder / "mds"), columns={"x": "bytes"}, size_limit=1 << 27) as writer:
        for sample in samples:
            writer.write({"x": sample.tobytes()})
    data = StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=batch)

    def run() -> Iterator[int]:
        for item in DataLoader(data, batch, collate_fn=lambda rows: packed(as_sample(r["x"]) for r in rows)):
            yield 0 if item is None else 1

    return {"MosaicML Streaming": run}


def lit(samples: list[np.ndarray], batch: int, folder: Path) -> dict[str, Loader]:
    import litdata
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder / "lit"), chunk_bytes=1 << 27)
    for i, sample in enumerate(samples):
        writer[i] = {"x": sample.tobytes()}
    writer.done()
    writer.merge(1)
    data = litdata.StreamingDataset(str(folder / "lit"), shuffle=True, drop_last=False)

    def run() -> Iterator[int]:
        for item in litdata.StreamingDataLoader(
            data, batch_size=batch, num_workers=0, collate_fn=lambda rows: packed(as_sample(r["x"]) for r in rows)
        ):
            yield 0 if item is None else 1

    return {"LitData": run}


def drop(folder: Path) -> None:
    """Drop the files of `folder` from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(run: Callable[[], Any]) -> float:
    """Seconds of an epoch; of a run that took its own time, that."""
    begun = time.perf_counter()
    found = run()
    if isinstance(found, float):
        return found
    for _ in found:
        pass
    return time.perf_counter() - begun


def plain(files: list[Path]) -> Iterator[int]:
    for file in files:
        np.fromfile(file, np.uint8)
        yield 1


AS_IT_COMES = """
import sys, time
import numpy as np
files = sys.stdin.read().split("\\n")
begun = time.perf_counter()
for file in files:
    np.fromfile(file, np.uint8)
print(time.perf_counter() - begun)
"""


def plain_elsewhere(files: list[Path]) -> float:
    """Seconds of the same in a fresh process, where nobody told malloc to keep what is freed."""
    names = "\n".join(map(str, files))
    return float(
        subprocess.run([sys.executable, "-c", AS_IT_COMES], input=names, capture_output=True, text=True).stdout
    )


def threaded(files: list[Path]) -> Iterator[int]:
    with ThreadPoolExecutor(2) as pool:
        yield from (len(data) for data in pool.map(lambda file: np.fromfile(file, np.uint8), files))


def blocks(space: Any, keys: list[str], threads: int) -> Iterator[int]:
    planned = space.plan(keys, STATES, max_block_bytes=1 << 40).blocks
    if threads == 1:
        yield from (len(read_block(block)) for block in planned)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from (len(samples) for samples in pool.map(read_block, planned))


def figure(value: float, how: str = ".2f") -> str:
    """Of what was not measured, a dash."""
    return "–" if np.isnan(value) else format(value, how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where the files are made: the disk that is measured")
    parser.add_argument("--only-ours", action="store_true", help="leave the other loaders out")
    parser.add_argument("--dry", action="store_true", help="do not write RESULTS.md")
    args = parser.parse_args()
    keep_freed_memory()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        space, keys, lengths = make(args.samples, folder)
        files = chunk_files(space)
        runs: dict[str, Callable[[], Any]] = {
            "np.fromfile of the same files": lambda: plain_elsewhere(files),
            "np.fromfile into memory it used before": lambda: plain(files),
            "np.fromfile, two threads": lambda: threaded(files),
            "our decoded blocks, one thread": lambda: blocks(space, keys, 1),
            "our decoded blocks, two threads": lambda: blocks(space, keys, 2),
            "our shuffled batches, disk tier": ours(space, keys, args.batch_size, "disk"),
            KEPT: ours(space, keys, args.batch_size, "host"),
        }
        if not args.only_ours:
            runs |= others(space, keys, lengths, args.batch_size, folder)
        size = sum(f.stat().st_size for f in files)
        warm, cold = dict.fromkeys(runs, np.inf), dict.fromkeys(runs, np.inf)
        for _ in range(args.rounds):
            for name, run in runs.items():
                drop(folder)
                cold[name] = min(cold[name], timed(run)) if name != KEPT else np.nan
                warm[name] = min(warm[name], timed(run), timed(run))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    first = next(iter(runs))
    rows = [
        (
            name,
            *(figure(size / s[name] / 1e9) for s in (warm, cold)),
            *(figure(s[first] / s[name]) for s in (warm, cold)),
            *("–" if name.startswith("np.") else figure(len(keys) / s[name], ",.0f") for s in (warm, cold)),
        )
        for name in runs
    ]
    head = ["loader", "warm GB/s", "cold GB/s", "warm ÷ fromfile", "cold ÷ fromfile", "samples/s warm", "cold"]
    about = (
        f"{len(keys)} samples of {lengths.mean():.0f} positions on average, {len(STATES)} states of width {WIDTH} as "
        f"float16, {size / 1e6:.0f} MB; batches of {args.batch_size}, shuffled anew in every epoch, packed and decoded "
        f"to float32; {torch.get_num_threads()} threads; best of {args.rounds} rounds. Ours checks every chunk "
        "against its digest; the others check nothing but zarr's crc32c. np.fromfile runs in a process of its own, as "
        "it comes, and twice more with memory that was used before, as ours has it. Two threads read for our batches, "
        "and the disk reads ahead. The host tier is what training takes where the blocks fit: they stay in memory "
        "after the first epoch, as the files that Arrow maps do in the page cache, and are not checked again. Arrow "
        "files stay mapped and so cannot be dropped from the page cache: their cold figures are warm ones."
    )
    print(f"{about}\n" + table_text(head, [list(r) for r in rows]))
    if not args.dry:
        command = " ".join(["python tests/benchmarks/loaders.py", *sys.argv[1:]])
        results.write("The stream and other loaders", command, f"{about}\n\n{results.markdown(head, rows)}")


if __name__ == "__main__":
    main()
