"""Number formats on tensors: encoding on the device that computed a state, decoding on the one that reads it.

The formats are those of `store.format.formats`; the store itself holds NumPy arrays. Between the two nothing is copied:
a tensor and an array share their memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from ml_dtypes import bfloat16, float8_e4m3fn, float8_e5m2
from torch import Tensor

from pipeline.store.errors import NonFinite
from pipeline.store.format.formats import HALF_MAX, SCALE_MAX, SCALE_MIN, Encoded, check_format

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
_FORMAT_OF = {dtype: name for name, dtype in _DTYPES.items()}
# What NumPy knows through ml_dtypes only: it passes to torch and back as integers of the same size.
_AS_INTEGERS = (
    (np.dtype(bfloat16), np.int16, torch.bfloat16, torch.int16),
    (np.dtype(float8_e4m3fn), np.uint8, torch.float8_e4m3fn, torch.uint8),
    (np.dtype(float8_e5m2), np.uint8, torch.float8_e5m2, torch.uint8),
)


def tensor_of(array: np.ndarray) -> Tensor:
    """`array` as a tensor of the same memory; a copy of one that may not be written to."""
    array = array if array.flags.writeable else array.copy()
    for kind, integer, dtype, _ in _AS_INTEGERS:
        if array.dtype == kind:
            return torch.from_numpy(array.view(integer)).view(dtype)
    return torch.from_numpy(array)


def array_of(tensor: Tensor) -> np.ndarray:
    """`tensor` as an array: of the same memory if it is contiguous and on the CPU, else a copy."""
    tensor = tensor.detach().cpu().contiguous()
    for kind, _, dtype, integer in _AS_INTEGERS:
        if tensor.dtype == dtype:
            return tensor.view(integer).numpy().view(kind)
    return tensor.numpy()


def tensors_of(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """`tensor_of` each: what `Store.load_tensors` gives, for a module."""
    return {name: tensor_of(array) for name, array in arrays.items()}


def arrays_of(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """`array_of` each: a module's weights, for `Store.save_weights`."""
    return {name: array_of(tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class EncodedTensor:
    """Rows of one state as stored, as tensors; see `store.format.formats.Encoded`."""

    values: Tensor
    scale: Tensor | None = None

    @classmethod
    def of(cls, encoded: Encoded) -> EncodedTensor:
        """Stored rows, sharing their memory."""
        return cls(tensor_of(encoded.values), None if encoded.scale is None else tensor_of(encoded.scale))

    def numpy(self) -> Encoded:
        """The same rows in host memory, for the store."""
        return Encoded(array_of(self.values), None if self.scale is None else array_of(self.scale))

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

    def to(self, device: torch.device | str) -> EncodedTensor:
        """The same rows on `device`."""
        return EncodedTensor(self.values.to(device), None if self.scale is None else self.scale.to(device))

    def slice(self, start: int, stop: int) -> EncodedTensor:
        """Rows `start` to `stop`, as views."""
        return EncodedTensor(self.values[start:stop], None if self.scale is None else self.scale[start:stop])

    def take(self, rows: Tensor) -> EncodedTensor:
        """The rows at `rows` (n,) int64, copied."""
        scale = None if self.scale is None else self.scale.index_select(0, rows)
        return EncodedTensor(self.values.index_select(0, rows), scale)


def encode(x: Tensor, fmt: str) -> EncodedTensor:
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
    return EncodedTensor(_own(x, _DTYPES[fmt]))


def decode(encoded: EncodedTensor | Encoded, dtype: torch.dtype | None = torch.float32) -> Tensor:
    """(rows, width) in `dtype`; with None as stored, or in float32 where rows have scales. Scaled rows are rebuilt in
    float32 first; values beyond `dtype` become infinite."""
    if isinstance(encoded, Encoded):
        encoded = EncodedTensor.of(encoded)
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


def _encode_half(x: Tensor, peak: Tensor) -> EncodedTensor:
    if not bool((peak > HALF_MAX).any()):
        return EncodedTensor(_own(x, torch.float16))
    # peak = mantissa · 2^power with mantissa in [0.5, 1); 65504 = 0.99951… · 2^16.
    mantissa, power = torch.frexp(peak)
    scale = (power - 16 + (mantissa > HALF_MAX / 65536).to(power.dtype)).clamp_(min=0)
    factor = torch.ldexp(torch.ones_like(peak), -scale)
    return EncodedTensor(x.float().mul(factor[:, None]).to(torch.float16), scale.to(torch.int8))


def _encode_int8(x: Tensor, peak: Tensor) -> EncodedTensor:
    scale = peak / 127
    # A row of zeros, or of denormals too small for a scale of full precision, is stored as zeros.
    scale = torch.where(scale < SCALE_MIN, torch.ones_like(scale), scale.clamp(max=SCALE_MAX))
    return EncodedTensor((x / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale)
