"""Our methods equal their official code, number for number: every output and every trainable gradient of each case.

`python -m tests.golden.systems` prints the table of differences that is in tests/golden/README.md. The folder of cases
is set by GOLDEN; a case that nothing of ours claims to be is skipped by name, and listed at the end of the run.
"""

from __future__ import annotations

import pytest
from safetensors.torch import save_file

from tests.golden import Case, cases
from tests.golden.compare import MODES, NoSystem
from tests.golden.systems import SYSTEMS, compare, compared


@pytest.mark.parametrize("case", compared(), ids=lambda case: f"golden-{case.name}")
def test_outputs_and_gradients_are_the_official_ones(case: Case) -> None:
    try:
        found = compare(case)
    except NoSystem as missing:
        pytest.skip(f"golden: {case.name}: there is no system for {missing}")
    wrong = [str(d) for d in found if not d.equal]
    assert not wrong, f"{len(wrong)} of {len(found)} tensors differ, first: {'; '.join(wrong[:5])}"


def test_golden_comparison_sees_another_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = [c for c in compared() if c.mode == "train-scaled" and (c.repository, c.sources) in SYSTEMS]
    if not dropped:
        pytest.skip("golden: no case with dropout in this folder")
    monkeypatch.setitem(MODES, "train-scaled", 0.82)
    assert not all(d.equal for d in compare(dropped[0]))


def test_golden_files_go_by_their_metadata(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLDEN", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="not a folder"):
        cases()
    monkeypatch.setenv("GOLDEN", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no golden files"):
        cases()
    about = {"case": "sherl-t5", "repository": "a/b", "file": "x/new.py, y/other.py", "mode": "eval", "config": "{}"}
    save_file({}, tmp_path / "any.safetensors", metadata=about)
    with pytest.raises(NoSystem, match=r"a/b: x/new\.py, y/other\.py"):
        compare(*cases())
    save_file({}, tmp_path / "foreign.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"foreign\.safetensors is no golden file"):
        cases()
