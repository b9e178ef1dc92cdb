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

import numpy as np
import torch
from torch import Tensor

from pipeline.store.errors import NonFinite

FORMATS = ("float32", "bfloat16", "float16", "int8")

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
_FORMAT_OF = {dtype: name for name, dtype in _DTYPES.items()}
_HALF_MAX = 65504.0
# The largest int8 scale for which 127 · scale is still finite, and the smallest that keeps full precision.
_SCALE_MAX = float(np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0)))
_SCALE_MIN = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Encoded:
    """Rows of one state as stored.

    `values`: (rows, width) float32, bfloat16, float16 or int8. `scale`: (rows,) int8 exponents for float16, or None
    when no row needs one; (rows,) float32 for int8; else None. A row is `values · 2^scale` (float16) or
    `values · scale` (int8).
    """

    values: Tensor
    scale: Tensor | None = None

    @property
    def format(self) -> str:
        return _FORMAT_OF[self.values.dtype]

    @property
    def rows(self) -> int:
        return self.values.shape[0]

    @property
    def width(self) -> int:
        return self.values.shape[1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def cpu(self) -> Encoded:
        """The same rows in host memory."""
        return self.to("cpu")

    def to(self, device: torch.device | str) -> Encoded:
        """The same rows on `device`."""
        return Encoded(self.values.to(device), None if self.scale is None else self.scale.to(device))

    def slice(self, start: int, stop: int) -> Encoded:
        """Rows `start` to `stop`, as views."""
        return Encoded(self.values[start:stop], None if self.scale is None else self.scale[start:stop])

    def take(self, rows: Tensor) -> Encoded:
        """The rows at `rows` (n,) int64, copied."""
        scale = None if self.scale is None else self.scale.index_select(0, rows)
        return Encoded(self.values.index_select(0, rows), scale)


def check_format(fmt: str) -> str:
    """`fmt` if it is one of `FORMATS`, else ValueError."""
    if fmt not in FORMATS:
        raise ValueError(f"unknown number format {fmt!r}: choose one of {', '.join(FORMATS)}")
    return fmt


def bytes_per_value(fmt: str) -> float:
    """Bytes one value takes, without the scales (at most 4 bytes a row)."""
    return float(_DTYPES[check_format(fmt)].itemsize)


def encode(x: Tensor, fmt: str) -> Encoded:
    """`x` (rows, width), any floating dtype and device, in format `fmt`, on the same device.

    Raises NonFinite with the first row that holds NaN or infinity, or a value beyond the range of `fmt`.
    """
    check_format(fmt)
    if x.dim() != 2 or x.shape[1] == 0 or not x.is_floating_point():
        raise ValueError(f"a state is (rows, width) floating point, not {tuple(x.shape)} {x.dtype}")
    x = x.detach()
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        x = x.to(torch.float32)
    peak = _peak(x, torch.finfo(torch.bfloat16).max if fmt == "bfloat16" else torch.finfo(torch.float32).max)
    if fmt == "float16":
        return _encode_half(x, peak)
    if fmt == "int8":
        return _encode_int8(x.float(), peak)
    return Encoded(_own(x, _DTYPES[fmt]))


def decode(encoded: Encoded, dtype: torch.dtype | None = torch.float32) -> Tensor:
    """(rows, width) in `dtype`; with None as stored, or in float32 where rows have scales. Scaled rows are rebuilt in
    float32 first; values beyond `dtype` become infinite."""
    values, scale = encoded.values, encoded.scale
    if scale is None:
        return values if dtype is None else values.to(dtype)
    return rescale(values.to(torch.float32), scale).to(dtype or torch.float32)


def unscaled_dtype(fmt: str) -> torch.dtype:
    """What `decode(…, None)` gives of `fmt`, no row of which is beyond float16's range."""
    return torch.float32 if fmt == "int8" else _DTYPES[check_format(fmt)]


def rescale(values: Tensor, scale: Tensor) -> Tensor:
    """`values` (rows, width) float32 times their rows' scales, in place: float32 factors, or int8 exponents of two."""
    if scale.dtype == torch.int8:
        scale = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale)
    return values.mul_(scale[:, None])


def _peak(x: Tensor, limit: float) -> Tensor:
    """Largest magnitude of each row, (rows,) float32; also finds NaN and infinity."""
    # Both propagate NaN, and without a temporary they are thirty times faster than vector_norm on a CPU.
    peak = torch.maximum(x.amax(1), -x.amin(1)).float()
    bad = ~(peak <= limit)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        what = "NaN or infinity" if not bool(torch.isfinite(peak[row])) else f"{float(peak[row]):g}, beyond the format"
        raise NonFinite(f"row {row} of a hidden state holds {what}", row=row)
    return peak


def _own(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, never sharing memory with `x`: a writer keeps it while the backbone may reuse its buffers."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _encode_half(x: Tensor, peak: Tensor) -> Encoded:
    if not bool((peak > _HALF_MAX).any()):
        return Encoded(_own(x, torch.float16))
    # peak = mantissa · 2^power with mantissa in [0.5, 1); 65504 = 0.99951… · 2^16.
    mantissa, power = torch.frexp(peak)
    scale = (power - 16 + (mantissa > _HALF_MAX / 65536).to(power.dtype)).clamp_(min=0)
    factor = torch.ldexp(torch.ones_like(peak), -scale)
    return Encoded(x.float().mul(factor[:, None]).to(torch.float16), scale.to(torch.int8))


def _encode_int8(x: Tensor, peak: Tensor) -> Encoded:
    scale = peak / 127
    # A row of zeros, or of denormals too small for a scale of full precision, is stored as zeros.
    scale = torch.where(scale < _SCALE_MIN, torch.ones_like(scale), scale.clamp(max=_SCALE_MAX))
    return Encoded((x / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale)
