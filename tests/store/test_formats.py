"""Number formats: bounds on the error, range, and refusal of what is not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from pipeline.extract.encoding import EncodedTensor, array_of, decode, encode, tensor_of
from pipeline.store import FORMATS, NonFinite, bytes_per_value
from pipeline.store import decode as decode_array

FLOAT_MAX = float(np.finfo(np.float32).max)
SHAPES = npst.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6)
ANY = npst.arrays(np.float32, SHAPES, elements=st.floats(-(2.0**127), 2.0**127, width=32))
TAME = npst.arrays(np.float32, SHAPES, elements=st.floats(-1e6, 1e6, width=32))


@given(ANY)
@settings(max_examples=100, deadline=None)
def test_float32_is_exact(x: np.ndarray) -> None:
    assert np.array_equal(decode(encode(torch.from_numpy(x), "float32")).numpy(), x)


@given(ANY)
@settings(max_examples=100, deadline=None)
def test_bfloat16_error(x: np.ndarray) -> None:
    found = decode(encode(torch.from_numpy(x), "bfloat16")).double().numpy()
    assert np.all(np.abs(found - x.astype(np.float64)) <= 2.0**-8 * np.abs(x.astype(np.float64)) + 2.0**-130)


@given(ANY)
@settings(max_examples=200, deadline=None)
def test_float16_error(x: np.ndarray) -> None:
    encoded = encode(torch.from_numpy(x), "float16")
    assert bool(torch.isfinite(encoded.values).all())
    found = decode(encoded).double().numpy()
    exact = x.astype(np.float64)
    scale = np.zeros(len(x)) if encoded.scale is None else encoded.scale.double().numpy()
    assert np.all(scale >= 0)
    assert np.array_equal(scale > 0, np.abs(x).max(1) > 65504)
    # Half a unit in the last place: 2^-11 of the value, or half the smallest step of float16.
    assert np.all(np.abs(found - exact) <= np.maximum(2.0**-11 * np.abs(exact), 2.0 ** (scale[:, None] - 25)))


@given(st.one_of(ANY, TAME))
@settings(max_examples=200, deadline=None)
def test_int8_error(x: np.ndarray) -> None:
    encoded = encode(torch.from_numpy(x), "int8")
    assert encoded.scale is not None and bool((encoded.scale > 0).all())
    found = decode(encoded).double().numpy()
    peak = np.abs(x.astype(np.float64)).max(1, keepdims=True)
    assert np.all(np.isfinite(found))
    assert np.all(np.abs(found - x) <= peak / 254 * (1 + 1e-5) + 127 * 1.2e-38)


def test_float16_scale_is_lossless() -> None:
    """A row divided by a power of two keeps every bit that float16 has."""
    x = torch.tensor([[65504.0, 1.0], [65505.0, 64.0], [66246.0, -2.0], [131072.0, 0.5], [1.0, 2.0]])
    encoded = encode(x, "float16")
    assert encoded.scale is not None and encoded.scale.tolist() == [0, 1, 1, 2, 0]
    assert torch.equal(decode(encoded)[[0, 3, 4]], x[[0, 3, 4]])
    assert encode(x[[0, 4]], "float16").scale is None


def test_zero_rows() -> None:
    for fmt in FORMATS:
        assert torch.equal(decode(encode(torch.zeros(3, 4), fmt)), torch.zeros(3, 4))
        assert decode(encode(torch.zeros(0, 4), fmt)).shape == (0, 4)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_names_the_row(fmt: str, bad: float) -> None:
    x = torch.ones(5, 3)
    x[3, 1] = bad
    x[4, 0] = float("nan")
    with pytest.raises(NonFinite, match="row 3") as caught:
        encode(x, fmt)
    assert caught.value.row == 3


def test_beyond_bfloat16_is_refused() -> None:
    with pytest.raises(NonFinite, match="beyond the format"):
        encode(torch.tensor([[1.0], [FLOAT_MAX]]), "bfloat16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fmt", FORMATS)
def test_input_types(fmt: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, dtype=torch.float64).to(dtype)
    torch.testing.assert_close(decode(encode(x, fmt)), x.float(), rtol=1e-2, atol=3e-2)
    assert decode(encode(x, fmt), torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("fmt", FORMATS)
def test_encoded_never_shares_memory(fmt: str) -> None:
    """The backbone may reuse its buffers while a writer still holds what was encoded."""
    x = torch.randn(4, 6, dtype={"float16": torch.float16, "bfloat16": torch.bfloat16}.get(fmt, torch.float32))
    encoded = encode(x, fmt)
    before = encoded.values.clone()
    x.zero_()
    assert torch.equal(encoded.values, before)


def test_encoded_helpers() -> None:
    encoded = encode(torch.randn(5, 4) * 1e6, "float16")
    assert encoded.format == "float16" and (encoded.rows, encoded.width) == (5, 4)
    assert encoded.nbytes == 5 * 4 * 2 + 5
    assert torch.equal(decode(encoded.slice(1, 3)), decode(encoded)[1:3])
    assert torch.equal(decode(encoded.take(torch.tensor([4, 0]))), decode(encoded)[[4, 0]])
    assert [bytes_per_value(f) for f in FORMATS] == [4, 2, 2, 1]


@pytest.mark.parametrize("fmt", FORMATS)
def test_arrays_are_the_same_rows(fmt: str) -> None:
    """The store's arrays and the tensors made of them share their memory, and both decode to the same numbers."""
    encoded = encode(torch.randn(5, 4) * torch.tensor([1.0, 1e5, 1e-3, 3e4, 7e4])[:, None], fmt)
    kept = encoded.numpy()
    back = EncodedTensor.of(kept)
    assert kept.format == fmt and kept.nbytes == encoded.nbytes
    assert back.values.data_ptr() == encoded.values.data_ptr()
    assert np.array_equal(decode_array(kept), decode(encoded).numpy())
    assert torch.equal(decode(back), decode(encoded)) and torch.equal(decode(kept), decode(encoded))
    rows = np.array([4, 0])
    assert np.array_equal(decode_array(kept.take(rows)), decode_array(kept)[rows])


def test_what_may_not_be_written_to_is_copied() -> None:
    values = np.frombuffer(bytes(8), np.float32)
    made = tensor_of(values)
    made += 1
    assert values.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.bool])
def test_weights_of_any_type_pass_through_arrays(dtype: torch.dtype) -> None:
    whole = torch.tensor([[0.0, 1.0, 0.5], [2.0, -4.0, 0.0]]).to(dtype)
    for x in (whole, whole.T, whole[0, 1]):
        found = tensor_of(array_of(x))
        assert found.dtype == dtype and torch.equal(found.double(), x.double())


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="unknown number format 'fp8'"):
        encode(torch.zeros(1, 1), "fp8")
    with pytest.raises(ValueError, match="rows, width"):
        encode(torch.zeros(3), "float32")
    with pytest.raises(ValueError, match="floating point"):
        encode(torch.zeros(3, 3, dtype=torch.int64), "float32")
