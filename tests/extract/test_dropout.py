"""Our dropout: the probability, the scale, one mask for both directions, torch's generator."""

from __future__ import annotations

import pytest
import torch

from pipeline.extract.kernels.dropout import Dropout, drop


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("shape", [(200_001,), (129, 7, 221)])
def test_values_are_dropped_with_the_probability_and_scaled(p: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.full(shape, 3.0, requires_grad=True)
    out = drop(x, p, True)
    left = out[out != 0]
    # The step of 1 / 65,536 that p is rounded to moves the scale by less than this.
    torch.testing.assert_close(left, torch.full_like(left, 3 / (1 - p)), rtol=2e-4, atol=0)
    assert abs(len(left) / x.numel() - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad * 3, out.detach())


def test_neighbours_are_dropped_independently() -> None:
    torch.manual_seed(1)
    gone = (drop(torch.ones(400_000), 0.5, True) == 0).float() - 0.5
    for lag in range(1, 9):  # four values share one number of the generator
        assert abs(float((gone[lag:] * gone[:-lag]).mean())) < 5 * 0.25 / 400_000**0.5


def test_the_seed_decides() -> None:
    x = torch.randn(1000)

    def once(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return drop(x, 0.3, True)

    assert torch.equal(once(5), once(5)) and not torch.equal(once(5), once(6))


def test_evaluation_and_the_ends_of_the_range() -> None:
    x = torch.randn(50)
    module = Dropout(0.4)
    assert torch.equal(module.eval()(x), x) and not torch.equal(module.train()(x), x)
    assert torch.equal(drop(x, 0.0, True), x) and not drop(x, 1.0, True).any()
    assert drop(x.bfloat16(), 0.4, True).dtype == torch.bfloat16


def test_a_byte_a_value_is_kept_for_the_backward_pass() -> None:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        drop(torch.randn(1000, requires_grad=True), 0.1, True)
    assert sum(t.nbytes for t in kept) == 1000
