"""Remote files and their cache: ours, fsspec's own caching and obstore, on a bucket that rclone serves on this machine.

    python -m tests.benchmarks.remote_files [--rounds 3]

Files are read by 8 threads, as streams and listings read them. `far`: nothing is kept yet; `again`: the
same reader anew, what it keeps is there. A server on the same machine answers at once, so what is compared is the work
on this side. obstore is left out where it is not installed (`pip install obstore`); it keeps nothing on the disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np

from pipeline.store.files.cache import Cache
from pipeline.store.files.remote import S3Files
from tests.store import servers

SHAPES = {"24 chunks of 8 MB": (24, 8 << 20), "200 files of 20 kB": (200, 20 << 10)}
Read = Callable[[str], object]


def ours(cache: Path) -> Read:
    files = S3Files("s3://team", Cache(cache, 1 << 40))
    return lambda name: files.read(name, 1 << 30)


def fsspec_plain(cache: Path) -> Read:
    files = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    return lambda name: files.cat_file(f"team/{name}")


def fsspec_filecache(cache: Path) -> Read:
    options = {
        "cache_storage": str(cache),
        "target_options": {"skip_instance_cache": True},
        "skip_instance_cache": True,
    }
    files = fsspec.filesystem("filecache", target_protocol="s3", **options)

    def read(name: str) -> bytes:
        with files.open(f"team/{name}", "rb") as file:
            data: bytes = file.read()
        return data

    return read


def by_obstore(cache: Path) -> Read:
    import obstore
    from obstore.store import S3Store

    store = S3Store("team", endpoint=os.environ["AWS_ENDPOINT_URL"], client_options={"allow_http": True})
    return lambda name: bytes(obstore.get(store, name).bytes())


READERS = {
    "ours: s3fs, checked cache": (ours, 8),
    "ours, one thread": (ours, 1),
    "fsspec filecache": (fsspec_filecache, 8),
    "fsspec filecache, one thread": (fsspec_filecache, 1),
    "fsspec, nothing kept": (fsspec_plain, 8),
    "obstore, nothing kept": (by_obstore, 8),
}


def seconds(reader: Callable[[Path], Read], threads: int, cache: Path, names: list[str]) -> float:
    read = reader(cache)
    begun = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(read, names):
            pass
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder, servers.s3(Path(folder) / "s3") as keys:
        os.environ.update(keys)
        for shape, (count, size) in SHAPES.items():
            names = [f"spaces/x/segments/{size}/{i}" for i in range(count)]
            for name in names:
                path = Path(folder) / "s3" / "team" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(np.random.default_rng(0).bytes(size))
            print(f"\n{shape}\n{'':<30}{'far, files/s':>14}{'MB/s':>8}{'again, files/s':>16}{'MB/s':>8}")
            for label, (reader, threads) in READERS.items():
                found: list[list[float]] = []
                wrong = ""
                for _ in range(rounds):
                    cache = Path(folder) / "cache"
                    try:
                        found.append([seconds(reader, threads, cache, names) for _ in range(2)])
                    except Exception as error:  # of a library that is compared: it is the finding
                        wrong = f"{type(error).__name__}: {error}"
                        break
                    finally:
                        shutil.rmtree(cache, ignore_errors=True)
                if wrong:
                    print(f"{label:<30}  {wrong[:80]}", flush=True)
                    continue
                far, again = (min(column) for column in zip(*found, strict=True))
                cells = "".join(
                    f"{count / s:>{w}.0f}{count * size / s / 1e6:>8.0f}" for s, w in ((far, 14), (again, 16))
                )
                print(f"{label:<30}{cells}", flush=True)


if __name__ == "__main__":
    main()
