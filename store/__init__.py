"""The activation store: content-keyed hidden states in sealed Zarr segments. The format is written in FORMAT.md.

Public names are imported when first used, so that the errors alone cost no zarr; nothing here imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.store.blocks import Block, BlockPlan, Part, read_block
    from pipeline.store.digest import canonical_json, digest_bytes, digest_json
    from pipeline.store.errors import MissingStates, NonFinite, SpaceMismatch, StoreError, UserError
    from pipeline.store.formats import FORMATS, Encoded, bytes_per_value, check_format, decode
    from pipeline.store.index import Lookup
    from pipeline.store.names import CHUNK_BYTES, FORMAT, SEGMENT_BYTES, SEGMENT_SECONDS, stream_of
    from pipeline.store.samples import Samples
    from pipeline.store.segment import Problem, Segment
    from pipeline.store.space import Space
    from pipeline.store.store import Store
    from pipeline.store.tables import TableInfo, TaskTable
    from pipeline.store.writer import SegmentWriter

_HOMES = {
    "Block": "pipeline.store.blocks",
    "BlockPlan": "pipeline.store.blocks",
    "CHUNK_BYTES": "pipeline.store.names",
    "Encoded": "pipeline.store.formats",
    "FORMAT": "pipeline.store.names",
    "FORMATS": "pipeline.store.formats",
    "Lookup": "pipeline.store.index",
    "MissingStates": "pipeline.store.errors",
    "NonFinite": "pipeline.store.errors",
    "Part": "pipeline.store.blocks",
    "Problem": "pipeline.store.segment",
    "SEGMENT_BYTES": "pipeline.store.names",
    "SEGMENT_SECONDS": "pipeline.store.names",
    "Samples": "pipeline.store.samples",
    "Segment": "pipeline.store.segment",
    "SegmentWriter": "pipeline.store.writer",
    "Space": "pipeline.store.space",
    "SpaceMismatch": "pipeline.store.errors",
    "Store": "pipeline.store.store",
    "StoreError": "pipeline.store.errors",
    "TableInfo": "pipeline.store.tables",
    "TaskTable": "pipeline.store.tables",
    "UserError": "pipeline.store.errors",
    "bytes_per_value": "pipeline.store.formats",
    "canonical_json": "pipeline.store.digest",
    "check_format": "pipeline.store.formats",
    "decode": "pipeline.store.formats",
    "digest_bytes": "pipeline.store.digest",
    "digest_json": "pipeline.store.digest",
    "read_block": "pipeline.store.blocks",
    "stream_of": "pipeline.store.names",
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
    "Part",
    "Problem",
    "Samples",
    "Segment",
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
        raise AttributeError(f"module 'store' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
