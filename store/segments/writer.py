"""`SegmentWriter`: buffers samples in memory and seals them as one segment.

Nothing touches the disk before `seal`, so a kill costs at most what is buffered. When to seal is the caller's choice:
`SEGMENT_BYTES` or `SEGMENT_SECONDS` after the first sample, whichever comes first. Sealing writes and syncs every file,
then the manifest under a temporary name, and renames it: from then on, and not before, readers see the segment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from pipeline.store.errors import StoreError
from pipeline.store.files.local import Files, explain
from pipeline.store.format.arrays import ArraySpec, chunk_buffers, group_files
from pipeline.store.format.digest import canonical_json
from pipeline.store.format.formats import Encoded
from pipeline.store.format.keys import Keys
from pipeline.store.format.manifest import KIND, Manifest, StateInfo
from pipeline.store.format.names import FORMAT, MAX_JSON, MAX_LENGTH, new_segment_id, segment_path, stream_of
from pipeline.store.format.samples import Samples
from pipeline.store.segments.segment import STORED_DTYPES, Segment
from pipeline.store.segments.unsealed import sign

Source = Callable[[], np.ndarray]


class SegmentWriter:
    """Collects samples for one segment of the space `space`; made by `Space.writer`.

    `fmt`: the number format every state must have, or None. `base`: the segment to supplement, or None.
    """

    def __init__(
        self, files: Files, space: str, fmt: str | None, provenance: dict[str, Any], base: Segment | None = None
    ) -> None:
        canonical_json(provenance)
        if base is not None and base.base is not None:
            raise ValueError(f"segment {base.id} is itself a supplement: supplement its base {base.base}")
        self._files, self._space, self._format = files, space, fmt
        self._provenance, self._base = provenance, base
        self.abandon()

    @property
    def nbytes(self) -> int:
        """Bytes of states and columns buffered."""
        return self._nbytes

    @property
    def samples(self) -> int:
        """Samples buffered."""
        return len(self._keys)

    @property
    def age(self) -> float:
        """Seconds since the first sample was added; 0 while there is none."""
        return time.monotonic() - self._since if self._parts else 0.0

    def add(self, samples: Samples) -> None:
        """Buffer whole samples. Their arrays are kept, not copied: do not change them afterwards.

        Raises ValueError if they do not fit together, repeat a key, or differ in states from those added before.
        """
        samples.check()
        if not len(samples):
            return
        for name, state in samples.states.items():
            if self._format is not None and state.format != self._format:
                raise ValueError(f"{name} is {state.format}, this feature space holds {self._format}")
        if any(int(np.max(v, initial=0)) >= MAX_LENGTH for v in samples.lengths.values()):
            raise ValueError(f"a sample has {MAX_LENGTH} rows or more")
        shape = _shape(samples)
        if self._parts and shape != _shape(self._parts[0]):
            raise ValueError(f"these samples hold {shape}, those added before {_shape(self._parts[0])}")
        repeated = self._keys.intersection(samples.keys)
        if repeated or len(set(samples.keys)) < len(samples):
            raise ValueError(f"sample {next(iter(repeated), 'key')} was added twice to one segment")
        if not self._parts:
            self._since = time.monotonic()
        self._parts.append(samples)
        self._keys.update(samples.keys)
        self._nbytes += samples.nbytes

    def abandon(self) -> None:
        """Forget what is buffered. The writer can be used anew."""
        self._parts: list[Samples] = []
        self._keys: set[str] = set()
        self._nbytes = 0
        self._since = 0.0

    def seal(self) -> Segment:
        """Write what is buffered as a sealed segment and return it; the writer is empty again.

        Raises StoreError (disk full, no permission, …) after removing what it wrote; the buffer is then kept, so that
        sealing can be tried again once there is room.
        """
        if not self._parts:
            raise ValueError("there is nothing to seal")
        keys = Keys.joined(Keys.of(part.keys) for part in self._parts)
        lengths = {
            stream: np.concatenate([np.asarray(part.lengths[stream], np.int64) for part in self._parts])
            for stream in self._parts[0].lengths
        }
        self._check_base(keys, lengths)
        segment = new_segment_id()
        folder = segment_path(self._space, segment)
        try:
            self._write(segment, folder, keys, lengths)
        except BaseException as error:
            self._undo(folder)
            if isinstance(error, OSError):
                where = self._files.root
                raise explain(error, "writing a segment to", where, self._nbytes, self._files.free) from error
            raise
        self.abandon()
        return Segment(self._files, self._space, segment)

    def _write(self, segment: str, folder: str, keys: Keys, lengths: dict[str, np.ndarray]) -> None:
        files = self._files
        arrays = self._arrays(len(keys), lengths)
        attributes = {"kind": KIND, "format": FORMAT, "space": self._space, "segment": segment}
        files.make(folder)
        sign(files, f"{folder}/writer.json")
        written = {}
        for name, data in group_files([spec for spec, _ in arrays], attributes).items():
            if "/" in name:
                files.make(f"{folder}/{name.rsplit('/', 1)[0]}")
            written[name] = files.write(f"{folder}/{name}", [data])
        for spec, source in arrays:
            for name, buffers in chunk_buffers(spec, source()):
                written[name] = files.write(f"{folder}/{name}", buffers)
        files.sync(f"{folder}/{name}" for name in written)
        files.sync({f"{folder}/{name}".rsplit("/", 1)[0] for name in written})
        manifest = Manifest(
            segment,
            self._space,
            None if self._base is None else self._base.id,
            keys,
            lengths,
            {n: StateInfo(s.width, s.format, self._scaled(n)) for n, s in self._parts[0].states.items()},
            tuple(self._parts[0].columns),
            written,
            self._provenance,
            datetime.now(UTC).isoformat(timespec="seconds"),
        )
        sealed = manifest.dump()
        if len(sealed) > MAX_JSON:
            raise StoreError(
                f"a segment of {len(keys)} samples needs a manifest above {MAX_JSON >> 20} MB: seal earlier"
            )
        files.publish(f"{folder}/manifest.json", sealed)
        # The parent too, or a power cut may forget the folder that was just sealed.
        files.sync([folder.rsplit("/", 1)[0]])
        files.remove(f"{folder}/writer.json")

    def _undo(self, folder: str) -> None:
        try:
            # The seal first: a segment that is losing its files must not look sealed.
            self._files.remove(f"{folder}/manifest.json")
            self._files.remove_tree(folder, last="writer.json")
        except (OSError, StoreError):
            pass  # What stays is unsealed, unseen by readers, and removed by the next sweep.

    def _arrays(self, samples: int, lengths: dict[str, np.ndarray]) -> list[tuple[ArraySpec, Source]]:
        """Every array with a function that makes its data, so that only one is held twice at a time."""
        rows = {stream: int(v.sum()) for stream, v in lengths.items()}
        arrays: list[tuple[ArraySpec, Source]] = []

        def put(name: str, shape: tuple[int, ...], dtype: str, source: Source, **attributes: Any) -> None:
            arrays.append((ArraySpec.new(name, shape, dtype, attributes), source))

        for name, state in self._parts[0].states.items():
            shape = (rows[stream_of(name)], state.width)
            put(name, shape, STORED_DTYPES[state.format], lambda n=name: self._values(n), format=state.format)  # type: ignore[misc]
            if self._scaled(name):
                kind = "float32" if state.format == "int8" else "int8"
                put(f"{name}.scale", shape[:1], kind, lambda n=name: self._scale(n), scale_of=name)  # type: ignore[misc]
        for name in self._parts[0].columns:
            put(name, (rows[stream_of(name)],), "int32", lambda n=name: self._column(n))  # type: ignore[misc]
        for stream, v in lengths.items():
            put(f"{stream}.lengths", (samples,), "int32", lambda v=v: v.astype(np.int32))  # type: ignore[misc]
        return arrays

    def _states(self, name: str) -> list[Encoded]:
        return [part.states[name] for part in self._parts]

    def _scaled(self, name: str) -> bool:
        return any(state.scale is not None for state in self._states(name))

    def _values(self, name: str) -> np.ndarray:
        values = np.concatenate([state.values for state in self._states(name)])
        return values.view(np.uint16) if values.dtype == bfloat16 else values

    def _scale(self, name: str) -> np.ndarray:
        return np.concatenate([np.zeros(s.rows, np.int8) if s.scale is None else s.scale for s in self._states(name)])

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([part.columns[name] for part in self._parts])

    def _check_base(self, keys: Keys, lengths: dict[str, np.ndarray]) -> None:
        base = self._base
        if base is None:
            return
        if keys != base.keys:
            raise ValueError(f"a supplement holds the samples of its base {base.id}, all of them and in the same order")
        for stream, values in lengths.items():
            if stream in base.lengths and not np.array_equal(values, base.lengths[stream]):
                raise StoreError(
                    f"the lengths of stream {stream} differ from those in segment {base.id}: "
                    "the inputs were not prepared as they were then; check the versions in its manifest"
                )


def _shape(samples: Samples) -> tuple[Any, ...]:
    """What two batches of one segment must share."""
    states = tuple(sorted((name, s.width, s.format) for name, s in samples.states.items()))
    return states, tuple(sorted(samples.columns)), tuple(sorted(samples.lengths))
