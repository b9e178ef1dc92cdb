"""Fast sorts give what NumPy's plain ones give, ties and ends of the range included."""

import numpy as np
import pytest

from pipeline.store.format.sorting import distinct, sorted_places, stable_order


@pytest.mark.parametrize("n", [0, 1, 7, 5000])
def test_sorted_places_is_a_stable_argsort(n: int) -> None:
    draws = np.random.default_rng(n)
    values = draws.choice(np.array([0, 1, 2, 3, 1 << 31, (1 << 32) - 1]), n)
    ordered, places = sorted_places(values)
    expected = np.argsort(values, kind="stable")
    assert places.dtype == ordered.dtype == np.uint32
    assert np.array_equal(places, expected) and np.array_equal(ordered, values[expected])


@pytest.mark.parametrize("distinct_values", [3, 1 << 50])
def test_stable_order_is_a_stable_argsort_with_ties_and_without(distinct_values: int) -> None:
    values = np.random.default_rng(0).integers(0, distinct_values, 4000) / 7
    assert np.array_equal(stable_order(values), np.argsort(values, kind="stable"))


def test_distinct_is_unique_of_each_part() -> None:
    draws = np.random.default_rng(0)
    parts = [draws.integers(0, 9, k) for k in (5, 0, 1, 64, 0)]
    for found, part in zip(distinct(parts), parts, strict=True):
        assert np.array_equal(found, np.unique(part))
    assert distinct([]) == []
    assert [len(part) for part in distinct([np.zeros(0, np.int64)] * 2)] == [0, 0]
