"""Sizes as people write them."""

from __future__ import annotations

import pytest
from dask.utils import parse_bytes

from pipeline.store.errors import UserError
from pipeline.store.sizes import parse_size

WRITTEN = ("50GB", "500 MB", "1GiB", "0", "123", "1e6", "1e-3 GB", "1.1 kB", "2m", "3 Ti", " .5 TB ", "4.7PiB", "5k")
NONSENSE = ("much", "", "-5GB", "5 foos", "1.2.3GB", "1e999", "nan", "inf", "GB", "5iB", "4GBB", "４GB")


@pytest.mark.parametrize("text", WRITTEN)
def test_a_size_is_what_dask_makes_of_it(text: str) -> None:
    assert parse_size(text) == parse_bytes(text)


@pytest.mark.parametrize("text", NONSENSE)
def test_nonsense_is_one_line_that_names_it(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_size(text, "--memory")
    assert str(caught.value) == f"--memory {text!r}: expected something like 4GB or 500MB"
