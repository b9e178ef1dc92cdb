"""Where several feature spaces fit, every command asks which one is meant; a live run takes none by itself."""

from __future__ import annotations

import pytest

from pipeline.store import Store
from tests.pipeline.test_errors import refused, run


@pytest.fixture(scope="module")
def two(checkpoints, table, tmp_path_factory) -> list[object]:
    """Options of a store with the table's states in two number formats."""
    store = tmp_path_factory.mktemp("two") / "store"
    common = ["--model", checkpoints["bert"], "--task", table, "--text", "first", "--label", "label", "--store", store]
    for form in ("float32", "bfloat16"):
        made = run("extract", *common, "--for", "probe", "--limit", 24, "--format", form)
        assert made.exit_code == 0, made.output
    return common


def spaces(options: list[object]) -> list[str]:
    return [space.id for space in Store.open(str(options[-1])).spaces()]


@pytest.mark.parametrize("live", [[], ["--live"]])
def test_training_asks_which_space_live_too(two, tmp_path, live):
    train = ["train", *two, "--tuner", "probe", "--max-steps", 1, "--out", tmp_path / "run", *live]
    line = refused(run(*train), "2 feature spaces fit", "--space ID", "bfloat16", "float32")
    assert all(space[:8] in line for space in spaces(two)) and not (tmp_path / "run").exists()
    for own in (["--format", "float32"], ["--space", spaces(two)[0][:8]]):
        made = run(*train, *own, "--overwrite")
        assert made.exit_code == 0, made.output


def test_a_comparison_with_live_methods_asks_too(two, tmp_path):
    options = ["compare", *two, "--tuners", "bitfit", "--max-steps", 1, "--out", tmp_path / "runs"]
    refused(run(*options), "2 feature spaces fit", "--space ID")


def test_a_live_run_with_the_beginning_of_several_ids_is_refused(two, tmp_path, monkeypatch):
    one = Store.open(str(two[-1])).spaces()[0]
    monkeypatch.setattr(Store, "spaces", lambda self: [one, one])  # two ids that begin alike
    train = ["train", *two, "--tuner", "probe", "--live", "--max-steps", 1, "--out", tmp_path / "run"]
    refused(run(*train, "--space", one.id[:4]), "--space", "fits 2 spaces")
