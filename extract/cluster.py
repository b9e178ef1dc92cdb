"""Extraction by the workers of a Dask `distributed` scheduler: one worker a GPU, the backbone loaded once in each.

    inputs ──one file in the store──► pieces of about a segment ──a task each──► workers ──seal──► the store

Through the scheduler go only names, numbers and reports. Every worker sees the store, and the checkpoint under the same
name. A worker that dies costs its open segment: its piece goes to another, which computes what is not sealed. Price of
that simplicity: one small file with the token ids in the store, removed at the end (`gc` removes that of a killed one).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from pipeline.extract.backbones.live import LiveBackbone
from pipeline.extract.batching import extraction_batches
from pipeline.extract.extraction import Interrupted, Report, compute, plan_work, progress_bar
from pipeline.extract.feature_space import PRECISIONS, differences_of
from pipeline.extract.inputs import Inputs
from pipeline.extract.plugins import import_modules
from pipeline.extract.projection import load_projection
from pipeline.store import SEGMENT_BYTES, Space, Store, stream_of
from pipeline.store.errors import StoreError, UserError
from pipeline.store.format.names import space_path

_WORK_LIMIT = 1 << 36
_BUSY = Lock()


@dataclass(frozen=True)
class Piece:
    """What one task computes: the samples `start` to `stop` of the file `work`, or all of the segment `base`."""

    store: str
    space: str
    model: str
    device: str
    states: tuple[str, ...]
    work: str
    start: int
    stop: int
    base: str
    options: dict[str, Any]
    imports: tuple[str, ...] = ()


def compute_on(
    address: str,
    space: Space,
    inputs: Inputs,
    keys: Sequence[str],
    states: Sequence[str],
    model: str,
    device: str,
    sample_bytes: float,
    *,
    seed: int = 0,
    tokens: int,
    batch_size: int | None = None,
    provenance: dict[str, Any] | None = None,
    quiet: bool = False,
    piece_bytes: int = SEGMENT_BYTES,
    imports: Sequence[str] = (),
) -> Report:
    """Like `extract.extraction.compute`, by the workers of the scheduler at `address`.

    `model`: as `extract.pretrained.checkpoint_for` takes it, on the workers too. `device`: "auto", "cpu" or "cuda".
    `imports`: modules that register what is not ours. `sample_bytes`: of a sample's states, on average. Raises
    UserError where no scheduler or worker answers, and what a worker raised; what was sealed until then stays.
    """
    if inputs.pictures is not None:
        raise UserError("--scheduler: only text is extracted on a cluster as yet; leave it out for images")
    client = connect(address)
    space.sweep()
    report = Report(samples=len(set(keys)), truncated=int(inputs.truncated.sum()))
    options = {"seed": seed, "tokens": tokens, "batch_size": batch_size, "provenance": provenance}
    common = (space.files.root, space.id, model, device)
    pieces, file = [], ""
    try:
        for item in plan_work(space, inputs, keys, states):
            if item.base is not None:
                pieces.append(
                    Piece(*common, tuple(item.states), "", 0, len(item.keys), item.base.id, options, tuple(imports))
                )
                continue
            # A piece is a fair mix of the task, as a segment is.
            order = np.concatenate(extraction_batches(item.inputs.tokens(), seed, tokens, batch_size))
            file = _write(space, item.inputs.take(order))
            share = max(1, len(order) // (4 * len(client.scheduler_info()["workers"])))
            step = min(share, max(1, int(piece_bytes / max(1.0, sample_bytes))))
            for start in range(0, len(order), step):
                stop = min(start + step, len(order))
                pieces.append(Piece(*common, tuple(item.states), file, start, stop, "", options, tuple(imports)))
        _run(client, pieces, report, quiet)
    finally:
        client.close()
        if file:
            space.files.remove(file)
    return report


def connect(address: str) -> Any:
    """A client of the scheduler at `address` with at least one worker. Raises UserError."""
    try:
        from distributed import Client
    except ImportError:
        raise UserError("--scheduler needs distributed: pip install 'activation-pipeline[distributed]'") from None
    try:
        client = Client(address, timeout=10, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise UserError(f"--scheduler {address}: no Dask scheduler answers there ({error}): start one") from None
    try:
        client.wait_for_workers(1, timeout=30)
    except TimeoutError:
        client.close()
        raise UserError(f"--scheduler {address}: it has no workers: start `dask worker {address}` on a GPU") from None
    return client


def _run(client: Any, pieces: list[Piece], report: Report, quiet: bool) -> None:
    from distributed import as_completed

    futures = client.map(run_piece, pieces, pure=False)
    total = sum(piece.stop - piece.start for piece in pieces)
    bar = progress_bar(total, quiet)
    sizes = {future.key: piece.stop - piece.start for future, piece in zip(futures, pieces, strict=True)}
    try:
        for future in as_completed(futures, loop=client.loop):
            done = future.result()
            report.computed += done["computed"]
            report.bytes += done["bytes"]
            report.segments += done["segments"]
            bar.update(sizes[future.key])
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped: {report.computed} of {total} samples are computed and sealed; the workers finish what they have "
            "begun; the same command goes on from there"
        ) from None
    finally:
        client.cancel(futures)
        bar.close()


def run_piece(piece: Piece) -> dict[str, int]:
    """On a worker: compute what is not stored of `piece` and seal it."""
    # The backbone's hooks are not for two threads at once; a worker with several threads takes turns.
    with _BUSY:
        import_modules(piece.imports)
        space = Store.open(piece.store).space(piece.space)
        live = _live(piece.model, piece.device, piece.store, piece.space)
        if piece.base:
            segment = next((s for s in space.segments() if s.id == piece.base), None)
            if segment is None:
                raise StoreError(f"segment {piece.base} is gone: run the same command again")
            read = segment.read(columns=list(live.backbone.columns))
            inputs = Inputs(read.lengths, read.columns, np.zeros(len(read), bool))
            keys = list(read.keys)
        else:
            inputs = _work(piece.store, piece.work).take(np.arange(piece.start, piece.stop))
            keys = inputs.keys()
        done = compute(space, inputs, keys, piece.states, live, quiet=True, **piece.options)
    return {"computed": done.computed, "bytes": done.bytes, "segments": done.segments}


@lru_cache(maxsize=1)
def _live(model: str, device: str, store: str, space: str) -> LiveBackbone:
    """The backbone of a space, loaded once a worker. Raises StoreError if the checkpoint here is another one."""
    from pipeline.extract.pretrained import checkpoint_for

    opened = Store.open(store)
    identity = opened.space(space).identity
    checkpoint = checkpoint_for(model)
    if differing := [name for name, *_ in differences_of(checkpoint, identity)]:
        named = ", ".join(differing)
        raise StoreError(f"{model} on this worker has other {named} than the feature space: give all the same")
    gpu = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise UserError("--device cuda: torch sees no GPU on a worker; use --device cpu or auto")
    place = torch.device("cuda" if gpu else "cpu")
    backbone = checkpoint.backbone.projected(load_projection(opened, identity))
    precision = PRECISIONS[identity["precision"]]
    return LiveBackbone(
        backbone, lambda: backbone.load(checkpoint.folder, precision, identity["attention"], place), place
    )


def _write(space: Space, inputs: Inputs) -> str:
    """Inputs as one file in the store; its name."""
    tensors = {f"column/{name}": torch.from_numpy(c.astype(np.int32)) for name, c in inputs.columns.items()}
    tensors |= {f"lengths/{name}": torch.from_numpy(v.astype(np.int64)) for name, v in inputs.lengths.items()}
    folder = f"{space_path(space.id)}/work"
    name = f"{folder}/{secrets.token_hex(8)}.safetensors"
    space.files.make(folder)
    space.files.publish(name, save(tensors))
    return name


@lru_cache(maxsize=1)
def _work(store: str, name: str) -> Inputs:
    try:
        tensors = load(Store.open(store).files.read(name, _WORK_LIMIT))
    except FileNotFoundError:
        raise StoreError(f"{name} is gone from the store: the extraction it belongs to has ended") from None
    columns = {n.removeprefix("column/"): t.numpy() for n, t in tensors.items() if n.startswith("column/")}
    lengths = {n.removeprefix("lengths/"): t.numpy() for n, t in tensors.items() if n.startswith("lengths/")}
    assert all(stream_of(name) in lengths for name in columns)
    return Inputs(lengths, columns, np.zeros(len(next(iter(lengths.values()))), bool))
