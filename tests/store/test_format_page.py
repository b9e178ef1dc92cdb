"""The worked example of FORMAT.md runs, and reads what was stored."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import store
from pipeline.store import FORMATS, decode
from tests.store.helpers import samples, sealed, space

PAGE = Path(store.__file__).with_name("FORMAT.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("fmt", FORMATS)
def test_worked_example(tmp_path: Path, fmt: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    sealed(space(tmp_path, format=fmt), [3, 6, 9], fmt=fmt)
    found: dict[str, Any] = {}
    exec(code.replace('"STORE"', repr(str(tmp_path / "store"))), found)
    expected = samples([6], fmt=fmt)
    assert len(expected.columns["encoder.ids"]) > 1
    assert np.array_equal(found["ids"], expected.columns["encoder.ids"])
    assert np.array_equal(found["values"], decode(expected.states["encoder.3"]))


def test_the_page_names_this_format() -> None:
    assert f"format {store.FORMAT}" in PAGE.splitlines()[0]
