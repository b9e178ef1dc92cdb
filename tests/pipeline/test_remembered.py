"""Rates of a machine are measured once and remembered with their date; a file that cannot be trusted is not used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.cost import rates
from pipeline.cost.plan import run_plan
from pipeline.cost.remembered import KIND, Remembered
from pipeline.recipe import Recipe
from pipeline.store.errors import Notice
from pipeline.store.files.places import cache_folder
from pipeline.store.format.document import dump_document

CPU = torch.device("cpu")


def test_a_rate_is_measured_once() -> None:
    first = Remembered(CPU)
    assert first.rate("step", {"n": 1}, lambda: (0.5, None)) == (0.5, None) and not first.dates
    assert first.rate("step", {"n": 1}, lambda: (9.0,)) == (0.5, None) and first.measured == 1 and not first.dates
    first.save()
    again = Remembered(CPU)
    assert again.rate("step", {"n": 1}, lambda: (9.0,)) == (0.5, None) and len(again.dates) == 1
    assert again.rate("step", {"n": 2}, lambda: (2.0,)) == (2.0,) and again.measured == 1  # of another shape
    anew = Remembered(CPU, again=True)
    assert anew.rate("step", {"n": 1}, lambda: (9.0,)) == (9.0,) and not anew.dates
    anew.save()
    assert Remembered(CPU).rate("step", {"n": 1}, lambda: (1.0,)) == (9.0,)


def test_another_machine_is_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Remembered(CPU)
    here.rate("step", {}, lambda: (1.0,))
    here.save()
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    assert Remembered(CPU).rate("step", {}, lambda: (2.0,)) == (2.0,)


DAMAGES = {
    "a byte": lambda data, about: data.replace(b'"figures":[1.0]', b'"figures":[7.0]'),
    "cut": lambda data, about: data[:-9],
    "not JSON": lambda data, about: b"{",
    "of another machine": lambda data, about: dump_document({**about, "machine": {"host": "elsewhere"}}),
    "of no speed": lambda data, about: dump_document({**about, "rates": {"a": {"figures": [0], "date": "2026-01-01"}}}),
    "no date": lambda data, about: dump_document({**about, "rates": {"a": {"figures": [1.0]}}}),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_file_is_not_used(damage: str) -> None:
    first = Remembered(CPU)
    first.rate("step", {}, lambda: (1.0,))
    first.save()
    about = {"kind": KIND, "format": 1, "machine": first.machine, "rates": {}}
    first.path.write_bytes(DAMAGES[damage](first.path.read_bytes(), about))
    with pytest.warns(Notice, match="its rates are not used") as told:
        again = Remembered(CPU)
    assert len(told) == 1 and "\n" not in str(told[0].message)
    assert again.rate("step", {}, lambda: (2.0,)) == (2.0,)
    again.save()  # and is mended
    assert Remembered(CPU).rate("step", {}, lambda: (3.0,)) == (2.0,)


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(Notice):
        known = Remembered(CPU)
    known.rate("step", {}, lambda: (1.0,))
    known.save()


def test_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPELINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/activation-pipeline")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored
    assert cache_folder() == Path.home() / ".cache" / "activation-pipeline"


def test_plan_says_of_when_its_rates_are(
    checkpoints: dict[str, Path], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(rates, "backbone_rate", lambda *a: calls.append("backbone") or 1e9)
    monkeypatch.setattr(rates, "step_seconds", lambda *a: calls.append("step") or 0.01)
    monkeypatch.setattr(rates, "decode_rate", lambda *a: calls.append("decode") or 1e9)
    monkeypatch.setattr(rates, "disk_rates", lambda *a: calls.append("disk") or (1e9, 1e9, None))
    more = {"text": "first", "text_pair": "second", "label": "label", "store": str(tmp_path), "device": "cpu"}
    recipe = Recipe(model=str(checkpoints["bert"]), task=str(table), tuner="probe", **more)
    plan, text = run_plan(recipe, None, None)
    first = sorted(calls)
    assert "measured here" in text and {*calls} == {"backbone", "step", "decode", "disk"} and not plan["rates_of"]
    calls.clear()
    again, text = run_plan(recipe, None, None)
    assert not calls and again["rates"] == plan["rates"] and f"rates of {again['rates_of'][:10]} (--measure" in text
    _, text = run_plan(recipe, None, None, measure=True)
    assert sorted(calls) == first and "measured here" in text
    calls.clear()
    _, text = run_plan(Recipe(**{**vars(recipe), "tuner": "lst"}), None, None)
    assert {*calls} == {"step"} and f"{len(calls)} measured now" in text
