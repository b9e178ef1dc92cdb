"""Extraction: run the frozen backbone once over the samples a store lacks and seal their states.

    rows ──tokenise──► inputs, keys ──minus what is stored──► batches ──backbone──► encode ──► writer ──► sealed segment

Computing and writing overlap: a full segment is written by one background thread while the backbone goes on. A segment
is sealed every `SEGMENT_BYTES` or `SEGMENT_SECONDS`; that is all a kill can cost. Ctrl-C seals what is done.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from pipeline.extract.backbones.live import LiveBackbone
from pipeline.extract.batch import stream_of
from pipeline.extract.batching import consecutive_batches, extraction_batches
from pipeline.extract.encoding import encode
from pipeline.extract.inputs import Inputs
from pipeline.extract.kernels.memory import keep_freed_memory, return_freed_memory
from pipeline.store import SEGMENT_BYTES, SEGMENT_SECONDS, Encoded, Samples, Segment, SegmentWriter, Space
from pipeline.store.errors import NonFinite, UserError
from pipeline.store.progress import Bar
from pipeline.store.version import project_version


class Interrupted(UserError):
    """Ctrl-C. What was finished is sealed; the message says how to go on."""

    exit_code = 130


@dataclass
class Report:
    """What an extraction did. `samples`: asked for; `computed`: run through the backbone now; `bytes`: written."""

    samples: int = 0
    computed: int = 0
    bytes: int = 0
    segments: int = 0
    truncated: int = 0
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)


def progress_bar(total: int, quiet: bool) -> Bar:
    """Counts samples."""
    return Bar(total=total, unit=" samples", disable=quiet or not total, desc="extract", dynamic_ncols=True)


def compute(
    space: Space,
    inputs: Inputs,
    keys: Sequence[str],
    states: Sequence[str],
    live: LiveBackbone,
    *,
    tokens: int,
    batch_size: int | None = None,
    seed: int = 0,
    provenance: dict[str, Any] | None = None,
    quiet: bool = False,
    describe: Callable[[str], str] = lambda key: f"sample {key}",
    segment_bytes: int = SEGMENT_BYTES,
    segment_seconds: float = SEGMENT_SECONDS,
) -> Report:
    """Make sure `space` holds `states` of every sample of `inputs` (`keys` beside it); compute only what is missing.

    `describe(key)` names a sample in an error. Raises UserError for a non-finite state (naming sample and layer), a
    full disk, or Ctrl-C; whatever was finished before is sealed and never computed again.
    """
    keep_freed_memory()
    space.sweep()
    report = Report(samples=len(set(keys)), truncated=int(inputs.truncated.sum()))
    work = plan_work(space, inputs, keys, states)
    total = sum(len(w.inputs) for w in work)
    policy = {"tokens": tokens, "size": batch_size, "seed": seed}
    sealer = Sealer(space, {**(provenance or {}), "batch": policy}, segment_bytes, segment_seconds)
    bar = progress_bar(total, quiet)
    try:
        for item in work:
            lengths = item.inputs.tokens()
            # A supplement follows its base sample for sample; new samples come in a fair random order.
            batches = (
                extraction_batches(lengths, seed, tokens, batch_size)
                if item.base is None
                else consecutive_batches(lengths, tokens, batch_size)
            )
            for batch in batches:
                names = [item.keys[i] for i in batch]
                sealer.add(_run(live, item.inputs.take(batch), names, item.states, space, describe), item.base)
                report.computed += len(batch)
                bar.update(len(batch))
                bar.set_postfix_str(f"{sealer.bytes / 1e9:.2f} GB sealed", refresh=False)
            sealer.flush()
        sealer.finish()
    except KeyboardInterrupt:
        sealer.finish()
        done = "; the same command goes on from there"
        raise Interrupted(f"stopped: {report.computed} of {total} samples are computed and sealed{done}") from None
    except (NonFinite, UserError):
        sealer.finish(quietly=True)
        raise
    finally:
        bar.close()
        sealer.close()
        return_freed_memory()
        report.bytes, report.segments = sealer.bytes, sealer.segments
    return report


@dataclass
class Work:
    """Samples to run for `states`; with `base`, they are all of that segment's, in its order."""

    inputs: Inputs
    keys: list[str]
    states: list[str]
    base: Segment | None = None


def plan_work(space: Space, inputs: Inputs, keys: Sequence[str], states: Sequence[str]) -> list[Work]:
    """New samples as one piece of work, and one supplement for each segment that lacks some of the states.

    A supplement covers its whole base segment, also samples of other tasks: their inputs are read from the store.
    """
    distinct = list(dict.fromkeys(keys))
    stored = space.lookup(distinct, list(states))
    work = []
    again: set[str] = set()
    for segment in stored.bases:
        if inputs.pictures is not None:
            # Pixels are not in the store. A base whose images are all at hand is supplemented, else its samples that
            # are asked for are stored anew with all states.
            place = {k: i for i, k in reversed(list(enumerate(keys)))}
            if set(segment.keys) <= place.keys():
                kept = inputs.take(np.asarray([place[k] for k in segment.keys], np.int64))
                work.append(Work(kept, list(segment.keys), list(stored.missing[segment.id]), segment))
            else:
                again |= set(segment.keys)
            continue
        block = segment.read(states=[], columns=list(inputs.columns))
        kept = Inputs({s: block.lengths[s] for s in inputs.lengths}, block.columns, np.zeros(len(block.keys), bool))
        work.append(Work(kept, list(block.keys), list(stored.missing[segment.id]), segment))
    gone = stored.absent | np.asarray([k in again for k in distinct], bool)
    absent = [k for k, missing in zip(distinct, gone.tolist(), strict=True) if missing]
    if absent:
        place = {}
        for i, key in enumerate(keys):
            place.setdefault(key, i)
        at = np.asarray([place[k] for k in absent], np.int64)
        work.append(Work(inputs.take(at), absent, list(states)))
    return work


def _run(
    live: LiveBackbone,
    inputs: Inputs,
    keys: list[str],
    states: Sequence[str],
    space: Space,
    describe: Callable[[str], str],
) -> Samples:
    """Run one batch and encode its states in the space's format, on the device that computed them."""
    with torch.inference_mode():
        batch = live.states(inputs, states)
        encoded: dict[str, Encoded] = {}
        for name in states:
            try:
                encoded[name] = encode(batch.states[name], space.identity["format"]).numpy()
            except NonFinite as error:
                ends = np.cumsum(inputs.lengths[stream_of(name)])
                key = keys[int(np.searchsorted(ends, error.row, side="right"))]
                raise NonFinite(
                    f"state {name} of {describe(key)} is not finite (NaN or infinity); extraction stopped and what was "
                    "finished before is kept. Try --precision float32 or bfloat16, or look at that sample"
                ) from None
    columns = {k: v.astype(np.int32, copy=False) for k, v in inputs.columns.items()}
    return Samples(keys=keys, lengths=dict(inputs.lengths), states=encoded, columns=columns)


class Sealer:
    """Hands full segments to one background thread, so that the backbone goes on while they are written.

    At most one full segment waits while another is written: memory stays at about three segments.
    """

    def __init__(self, space: Space, provenance: dict[str, Any], most_bytes: int, most_seconds: float) -> None:
        self.space, self.provenance = space, provenance
        self.most_bytes, self.most_seconds = most_bytes, most_seconds
        self.bytes, self.segments = 0, 0
        self._writer: SegmentWriter | None = None
        self._base: Segment | None = None
        self._pending: list[tuple[SegmentWriter, int, Future[Segment]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="seal")

    def add(self, samples: Samples, base: Segment | None) -> None:
        """Buffer samples; a supplement is sealed with its base's last sample, anything else by size or age."""
        if self._writer is None:
            self._writer, self._base = self.space.writer(self.provenance, base), base
        self._writer.add(samples)
        if base is None and (self._writer.nbytes >= self.most_bytes or self._writer.age >= self.most_seconds):
            self.flush()

    def flush(self) -> None:
        """Start sealing what is buffered."""
        if self._writer is not None and self._writer.samples:
            while len(self._pending) > 1:
                self._settle()
            writer, self._writer = self._writer, None
            self._pending.append((writer, writer.nbytes, self._thread.submit(writer.seal)))

    def finish(self, quietly: bool = False) -> None:
        """Seal everything that is complete. A supplement that does not yet cover its base is dropped. `quietly`: an
        error is already on its way, do not hide it behind another."""
        try:
            if self._writer is not None and not self._covers_base():
                self._writer.abandon()
            self.flush()
            while self._pending:
                self._settle()
        except UserError:
            if not quietly:
                raise

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True)

    def _settle(self) -> None:
        _, size, future = self._pending.pop(0)
        future.result()
        self.bytes += size
        self.segments += 1

    def _covers_base(self) -> bool:
        return self._base is None or (self._writer is not None and self._writer.samples == len(self._base))


def provenance_of(
    model: str, revision: str, identity: dict[str, Any], device: torch.device, dataset: dict[str, Any]
) -> dict[str, Any]:
    """Where states come from, kept in every segment: model, dataset, library versions, device, precision."""
    libraries = {n: version(n) for n in ("torch", "transformers", "tokenizers", "zarr", "numpy")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "model": model,
        "revision": revision,
        "weights": identity["weights"],
        "precision": identity["precision"],
        "attention": identity["attention"],
        "dataset": dataset,
        "device": {"type": device.type, "name": name},
        "libraries": libraries,
        "project": project_version(),
        # Who extracts is recorded only for those who say so.
        **({"user": user} if (user := os.environ.get("PIPELINE_USER")) else {}),
    }
