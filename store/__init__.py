"""The activation store: content-keyed hidden states in sealed Zarr segments. The format is written in FORMAT.md.

Public names are imported when first used, so that the errors alone cost no zarr; nothing here imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.store.errors import MissingStates, NonFinite, SpaceMismatch, StoreError, UserError
    from pipeline.store.format.digest import canonical_json, digest_bytes, digest_json
    from pipeline.store.format.formats import FORMATS, Encoded, bytes_per_value, check_format, decode
    from pipeline.store.format.names import CHUNK_BYTES, FORMAT, SEGMENT_BYTES, SEGMENT_SECONDS, stream_of
    from pipeline.store.format.samples import Samples
    from pipeline.store.segments.blocks import Block, BlockPlan, SegmentPart, read_block
    from pipeline.store.segments.index import Lookup
    from pipeline.store.segments.segment import Problem, Segment
    from pipeline.store.segments.writer import SegmentWriter
    from pipeline.store.space import Space
    from pipeline.store.store import Store
    from pipeline.store.tables.table import TableInfo, TaskTable

_HOMES = {
    "Block": "pipeline.store.segments.blocks",
    "BlockPlan": "pipeline.store.segments.blocks",
    "CHUNK_BYTES": "pipeline.store.format.names",
    "Encoded": "pipeline.store.format.formats",
    "FORMAT": "pipeline.store.format.names",
    "FORMATS": "pipeline.store.format.formats",
    "Lookup": "pipeline.store.segments.index",
    "MissingStates": "pipeline.store.errors",
    "NonFinite": "pipeline.store.errors",
    "SegmentPart": "pipeline.store.segments.blocks",
    "Problem": "pipeline.store.segments.segment",
    "SEGMENT_BYTES": "pipeline.store.format.names",
    "SEGMENT_SECONDS": "pipeline.store.format.names",
    "Samples": "pipeline.store.format.samples",
    "Segment": "pipeline.store.segments.segment",
    "SegmentWriter": "pipeline.store.segments.writer",
    "Space": "pipeline.store.space",
    "SpaceMismatch": "pipeline.store.errors",
    "Store": "pipeline.store.store",
    "StoreError": "pipeline.store.errors",
    "TableInfo": "pipeline.store.tables.table",
    "TaskTable": "pipeline.store.tables.table",
    "UserError": "pipeline.store.errors",
    "bytes_per_value": "pipeline.store.format.formats",
    "canonical_json": "pipeline.store.format.digest",
    "check_format": "pipeline.store.format.formats",
    "decode": "pipeline.store.format.formats",
    "digest_bytes": "pipeline.store.format.digest",
    "digest_json": "pipeline.store.format.digest",
    "read_block": "pipeline.store.segments.blocks",
    "stream_of": "pipeline.store.format.names",
}

__all__ = [
    "CHUNK_BYTES",
    "FORMAT",
    "FORMATS",
    "SEGMENT_BYTES",
    "SEGMENT_SECONDS",
    "Block",
    "BlockPlan",
    "Encoded",
    "Lookup",
    "MissingStates",
    "NonFinite",
    "Problem",
    "Samples",
    "Segment",
    "SegmentPart",
    "SegmentWriter",
    "Space",
    "SpaceMismatch",
    "Store",
    "StoreError",
    "TableInfo",
    "TaskTable",
    "UserError",
    "bytes_per_value",
    "canonical_json",
    "check_format",
    "decode",
    "digest_bytes",
    "digest_json",
    "read_block",
    "stream_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline.store' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
