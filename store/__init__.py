"""The activation store: content-keyed hidden states in sealed Zarr segments. The format is written in FORMAT.md.

Public names are imported when first used, so that the errors alone cost neither torch nor zarr.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from store.blocks import Block, BlockPlan, Part, read_block
    from store.digest import canonical_json, digest_bytes, digest_json
    from store.errors import MissingStates, NonFinite, SpaceMismatch, StoreError, UserError
    from store.formats import FORMATS, Encoded, bytes_per_value, check_format, decode, encode
    from store.index import Lookup
    from store.names import CHUNK_BYTES, FORMAT, SEGMENT_BYTES, SEGMENT_SECONDS, stream_of
    from store.samples import Samples
    from store.segment import Problem, Segment
    from store.space import Space
    from store.store import Store
    from store.tables import TableInfo, TaskTable
    from store.writer import SegmentWriter

_HOMES = {
    "Block": "store.blocks",
    "BlockPlan": "store.blocks",
    "CHUNK_BYTES": "store.names",
    "Encoded": "store.formats",
    "FORMAT": "store.names",
    "FORMATS": "store.formats",
    "Lookup": "store.index",
    "MissingStates": "store.errors",
    "NonFinite": "store.errors",
    "Part": "store.blocks",
    "Problem": "store.segment",
    "SEGMENT_BYTES": "store.names",
    "SEGMENT_SECONDS": "store.names",
    "Samples": "store.samples",
    "Segment": "store.segment",
    "SegmentWriter": "store.writer",
    "Space": "store.space",
    "SpaceMismatch": "store.errors",
    "Store": "store.store",
    "StoreError": "store.errors",
    "TableInfo": "store.tables",
    "TaskTable": "store.tables",
    "UserError": "store.errors",
    "bytes_per_value": "store.formats",
    "canonical_json": "store.digest",
    "check_format": "store.formats",
    "decode": "store.formats",
    "digest_bytes": "store.digest",
    "digest_json": "store.digest",
    "encode": "store.formats",
    "read_block": "store.blocks",
    "stream_of": "store.names",
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
    "encode",
    "read_block",
    "stream_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'store' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
