"""Stores and runs of earlier versions are still what they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.compat.snapshot import FILE, observe


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    found = observe(Path(tmp_path_factory.mktemp("snapshot")))
    return json.loads(json.dumps(found))


@pytest.mark.parametrize("what", ["saved", "identities", "space ids", "keys", "version"])
def test_nothing_that_stores_and_runs_are_known_by_has_changed(observed: dict[str, object], what: str) -> None:
    assert observed[what] == json.loads(FILE.read_text(encoding="utf-8"))[what]
