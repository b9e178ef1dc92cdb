"""The stream against a plain read of the same bytes and against other loaders, in one run on the same tensors.

    python tests/benchmarks/loaders.py [--samples 800] [--batch-size 32] [--rounds 3] [--folder FOLDER] [--decoded]

Samples of RTE's lengths, nine states of width 768 as float16: what SHERL reads of a T5-base encoder. Every loader hands
out the same shuffled batches: the rows of its samples packed, state by state, as stored, which is what training takes;
with `--decoded` in float32, which is what `pipeline.stream` gives. `cold`: an epoch after the files were dropped from
the page cache; `first`: the first epoch of a loader opened anew (which is not timed), with all files there since an
epoch before; `later`: further epochs of that loader, which may have kept something (our host tier its blocks, Arrow its
mapping). Best of the rounds, one cold and two of the others in each, the loaders taking turns. Loaders that are not
installed are left out and named (`pip install litdata mosaicml-streaming`).
"""

from __future__ import annotations

import argparse
import gc
import itertools
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

from pipeline.extract.encoding import encode
from pipeline.extract.kernels.memory import keep_freed_memory
from pipeline.store import Samples, Store, digest_bytes, read_block
from pipeline.terminal import table_text
from pipeline.train.data.store_source import StoreSource, StreamOptions
from tests.benchmarks import results

STATES, WIDTH = [f"encoder.{i}" for i in (1, 2, 3, 5, 6, 7, 9, 10, 11)], 768
HANDED: torch.dtype | None = None  # what batches are decoded to; None: as stored
Epoch = Callable[[], Any]  # yields something for each batch, or returns the seconds it took
Loader = Callable[[], Epoch]  # opens what is read


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
        states = {name: encode(torch.randn(rows, WIDTH), "float16").numpy() for name in STATES}
        writer = space.writer({})
        writer.add(Samples(keys[part], {"encoder": lengths[part]}, states))
        writer.seal()
    return space, keys, lengths


def chunk_files(space: Any) -> list[Path]:
    return [f for s in space.segments() for name in STATES for f in sorted((s.path / name).glob("c.*"))]


def ours(space: Any, keys: list[str], batch: int, tier: str) -> Loader:
    def opened() -> Epoch:
        source = StoreSource(space, keys, None, STATES, (), StreamOptions(batch, tier=tier, dtype=HANDED))
        epochs = itertools.count()
        return lambda: (batch.states for batch in source.epoch(next(epochs)))

    return opened


def packed(samples: Iterable[np.ndarray]) -> dict[str, Tensor]:
    """Samples (states, rows, width) → each state's rows back to back: what our stream hands out."""
    whole = torch.from_numpy(np.concatenate(list(samples), axis=1))
    return {name: handed(whole[i]) for i, name in enumerate(STATES)}


def handed(rows: Tensor) -> Tensor:
    return rows.to(HANDED or rows.dtype)


def through_zarr(space: Any, keys: list[str], lengths: np.ndarray, batch: int) -> Loader:
    """zarr-python alone, two threads, no Dask: a segment a task, shuffled within."""
    segments = [zarr.open_group(str(s.path), mode="r") for s in space.segments()]
    sizes = [len(s) for s in space.segments()]
    place = {key: i for i, key in enumerate(keys)}
    known = [[place[k] for k in s.keys] for s in space.segments()]

    def read(number: int) -> list[list[np.ndarray]]:
        ends = np.cumsum([lengths[i] for i in known[number]])[:-1]
        with zarr.config.set({"async.concurrency": 4}):
            return [np.split(np.asarray(segments[number][name][:]), ends) for name in STATES]

    g = np.random.default_rng(0)

    def run() -> Iterator[dict[str, Tensor]]:
        order = g.permutation(len(segments))
        with ThreadPoolExecutor(2) as pool:
            for number, states in zip(order, pool.map(read, order), strict=True):
                pick = g.permutation(sizes[number])
                for a in range(0, len(pick), batch):
                    rows = [np.concatenate([state[i] for i in pick[a : a + batch]]) for state in states]
                    yield {n: handed(torch.from_numpy(r)) for n, r in zip(STATES, rows, strict=True)}

    return lambda: run


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


def torch_loader(data: Callable[[], Dataset[np.ndarray]], batch: int, workers: int) -> Loader:
    def opened() -> Epoch:
        context = "fork" if workers else None
        loader = DataLoader(
            data(), batch, shuffle=True, num_workers=workers, collate_fn=packed, multiprocessing_context=context
        )
        return lambda: iter(loader)

    return opened


def others(space: Any, keys: list[str], lengths: np.ndarray, batch: int, folder: Path) -> dict[str, Loader]:
    """The same samples, one after the other, in each of the other forms."""
    place = {key: i for i, key in enumerate(keys)}
    samples: list[np.ndarray] = [np.zeros(0)] * len(keys)
    for segment in space.segments():
        read = segment.read(STATES)
        rows = np.stack([read.states[name].values for name in STATES])
        for key, part in zip(read.keys, np.split(rows, np.cumsum(read.lengths["encoder"])[:-1], axis=1), strict=True):
            samples[place[key]] = np.ascontiguousarray(part)
    found: dict[str, Loader] = {"zarr, thread pool": through_zarr(space, keys, lengths, batch)}
    (folder / "pt").mkdir()
    for i, sample in enumerate(samples):
        torch.save(torch.from_numpy(sample), folder / "pt" / f"{i}.pt")
    for workers in (0, 2):
        found[f"torch.save files, {workers} workers"] = torch_loader(
            lambda: Files(folder / "pt", len(keys)), batch, workers
        )
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"x": datasets.Value("large_binary")})
    made = datasets.Dataset.from_generator(
        lambda: ({"x": s.tobytes()} for s in samples), features=features, cache_dir=str(folder / "arrow")
    )
    written = [f["filename"] for f in made.cache_files]
    del made  # nothing stays mapped

    def mapped() -> Rows:
        return Rows(datasets.concatenate_datasets([datasets.Dataset.from_file(f) for f in written]), "x")

    for workers in (0, 2):
        found[f"datasets (Arrow), {workers} workers"] = torch_loader(mapped, batch, workers)
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
    # It shares memory between processes under the folder's name, and so cannot be opened twice in one.
    data = StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=batch)
    loader = DataLoader(data, batch, collate_fn=lambda rows: packed(as_sample(r["x"]) for r in rows))
    return {"MosaicML Streaming": lambda: lambda: iter(loader)}


def lit(samples: list[np.ndarray], batch: int, folder: Path) -> dict[str, Loader]:
    import litdata
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder / "lit"), chunk_bytes=1 << 27)
    for i, sample in enumerate(samples):
        writer[i] = {"x": sample.tobytes()}
    writer.done()
    writer.merge(1)

    def opened() -> Epoch:
        data = litdata.StreamingDataset(str(folder / "lit"), shuffle=True, drop_last=False)
        loader = litdata.StreamingDataLoader(
            data, batch_size=batch, num_workers=0, collate_fn=lambda rows: packed(as_sample(r["x"]) for r in rows)
        )
        return lambda: iter(loader)

    return {"LitData": opened}


def drop(folder: Path) -> None:
    """Drop the files of `folder` from the page cache; those still mapped would stay there."""
    gc.collect()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def check(name: str, loader: Loader, positions: int) -> None:
    """Every sample once: an epoch has as many rows as all of them together."""
    found = sum(len(batch[STATES[0]]) for batch in loader()())
    if found != positions:
        raise SystemExit(f"{name}: an epoch has {found:,} positions, not {positions:,}")


def timed(run: Epoch) -> float:
    """Seconds of an epoch; of one that took its own time, that."""
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


def main() -> None:
    global HANDED
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where the files are made: the disk that is measured")
    parser.add_argument("--only-ours", action="store_true", help="leave the other loaders out")
    parser.add_argument("--dry", action="store_true", help="do not write RESULTS.md")
    parser.add_argument("--decoded", action="store_true", help="batches in float32, of all loaders")
    args = parser.parse_args()
    HANDED = torch.float32 if args.decoded else None
    keep_freed_memory()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        space, keys, lengths = make(args.samples, folder)
        files = chunk_files(space)
        plain_reads: dict[str, Loader] = {
            "np.fromfile of the same files": lambda: lambda: plain_elsewhere(files),
            "np.fromfile into memory it used before": lambda: lambda: plain(files),
            "np.fromfile, two threads": lambda: lambda: threaded(files),
            "our blocks, one thread": lambda: lambda: blocks(space, keys, 1),
            "our blocks, two threads": lambda: lambda: blocks(space, keys, 2),
        }
        loaders = plain_reads | {
            "our shuffled batches": ours(space, keys, args.batch_size, "host"),
            "our shuffled batches, nothing kept": ours(space, keys, args.batch_size, "disk"),
        }
        if not args.only_ours:
            loaders |= others(space, keys, lengths, args.batch_size, folder)
        for name, loader in loaders.items():
            if name not in plain_reads:
                check(name, loader, int(lengths.sum()))
        size = sum(f.stat().st_size for f in files)
        cold, first, later = (dict.fromkeys(loaders, np.inf) for _ in range(3))
        for _ in range(args.rounds):
            for name, loader in loaders.items():
                drop(folder)
                cold[name] = min(cold[name], timed(loader()))
                timed(loader())  # Linux moves a page at its second reading, which costs that reader alone
                for _ in range(2):
                    epoch = loader()
                    first[name] = min(first[name], timed(epoch))
                    later[name] = min(later[name], timed(epoch))
                    del epoch
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    plainest, kinds = next(iter(loaders)), {"cold": cold, "first": first, "later": later}
    rows = [
        (
            name,
            *(f"{size / s[name] / 1e9:.2f}" for s in kinds.values()),
            *(f"{s[plainest] / s[name]:.2f}" for s in kinds.values()),
            *("–" if name.startswith("np.") else f"{len(keys) / s[name]:,.0f}" for s in kinds.values()),
        )
        for name in loaders
    ]
    head = ["loader", *(f"{kind}{what}" for what in (" GB/s", " ÷ fromfile", " samples/s") for kind in kinds)]
    about = (
        f"{len(keys)} samples of {lengths.mean():.0f} positions on average, {len(STATES)} states of width {WIDTH} as "
        f"float16, {size / 1e6:.0f} MB; batches of {args.batch_size}, shuffled anew in every epoch, packed, "
        f"{'decoded to float32' if args.decoded else 'as stored'}; {torch.get_num_threads()} threads; best of "
        f"{args.rounds} rounds. Ours checks every chunk against its digest; the others check nothing but zarr's "
        "crc32c. np.fromfile runs in a process of its own, as it comes, and twice more with memory that was used "
        "before, as ours has it. Two threads read for our batches, and the disk reads ahead. Where the blocks fit, "
        "training keeps them in memory after an epoch (the host tier, as here) and does not check them again; "
        "`nothing kept` is the disk tier, which reads and checks every time. "
        "Cold: files dropped from the page cache; first: files in it, the loader opened anew (MosaicML's cannot be); "
        "later: the same loader again."
    )
    print(f"{about}\n" + table_text(head, [list(r) for r in rows]))
    if not args.dry:
        command = " ".join(["python tests/benchmarks/loaders.py", *sys.argv[1:]])
        what = "The stream and other loaders" + (", in float32" if args.decoded else "")
        results.write(what, command, f"{about}\n\n{results.markdown(head, rows)}")


if __name__ == "__main__":
    main()
