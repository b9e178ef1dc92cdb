"""Number formats: how a hidden state is written, at 4, 2 or 1 bytes a value.

| format   | stored as                    | largest relative error                                               |
|----------|------------------------------|----------------------------------------------------------------------|
| float32  | float32                      | 0                                                                    |
| bfloat16 | bfloat16 (uint16 on disk)    | 2⁻⁹ of the value                                                     |
| float16  | float16, exponent a row      | 2⁻¹¹ of the value down to 6.1e-5 (times the row's scale), absolute below |
| int8     | int8, float32 scale a row    | 1/254 of the row's largest value                                     |

T5's states exceed the float16 limit of 65,504 (66,246 was seen), so a float16 row whose largest magnitude is above it
is stored divided by the smallest power of two that makes it fit. Dividing by a power of two loses no precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

FORMATS = ("float32", "bfloat16", "float16", "int8")

_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(bfloat16),
    "float16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
}
_FORMAT_OF = {dtype: name for name, dtype in _DTYPES.items()}
HALF_MAX = 65504.0
# The largest int8 scale for which 127 · scale is still finite, and the smallest that keeps full precision.
SCALE_MAX = float(np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0)))
SCALE_MIN = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Encoded:
    """Rows of one state as stored.

    `values`: (rows, width) float32, bfloat16 (of ml_dtypes), float16 or int8. `scale`: (rows,) int8 exponents for
    float16, or None when no row needs one; (rows,) float32 for int8; else None. A row is `values · 2^scale` (float16)
    or `values · scale` (int8). `extract.encoding` makes them of tensors, and tensors of them.
    """

    values: np.ndarray
    scale: np.ndarray | None = None

    @property
    def format(self) -> str:
        return _FORMAT_OF[self.values.dtype]

    @property
    def rows(self) -> int:
        return int(self.values.shape[0])

    @property
    def width(self) -> int:
        return int(self.values.shape[1])

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def take(self, rows: np.ndarray) -> Encoded:
        """The rows at `rows` (n,) int64, copied."""
        return Encoded(self.values[rows], None if self.scale is None else self.scale[rows])


def check_format(fmt: str) -> str:
    """`fmt` if it is one of `FORMATS`, else ValueError."""
    if fmt not in FORMATS:
        raise ValueError(f"unknown number format {fmt!r}: choose one of {', '.join(FORMATS)}")
    return fmt


def bytes_per_value(fmt: str) -> float:
    """Bytes one value takes, without the scales (at most 4 bytes a row)."""
    return float(_DTYPES[check_format(fmt)].itemsize)


def decode(encoded: Encoded) -> np.ndarray:
    """(rows, width) float32."""
    values, scale = encoded.values.astype(np.float32), encoded.scale
    if scale is None:
        return values
    factor = np.ldexp(np.float32(1), scale) if scale.dtype == np.int8 else scale
    values *= factor[:, None]
    return values
