"""An option that would do nothing is refused, with the name of the tuner that has it: on the command line, in a recipe
and in Python; and `stream` looks at what it is given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml

from pipeline import api
from pipeline.checks.unused_options import STREAM_OPTIONS
from pipeline.recipe import field_names
from pipeline.runs import load_run
from pipeline.store import UserError
from tests.pipeline.test_errors import refused, run


@pytest.fixture(scope="module")
def stored(checkpoints, table, tmp_path_factory) -> dict[str, str]:
    """A store with a table's states for a probe, SHERL and LST."""
    store = tmp_path_factory.mktemp("unused") / "store"
    options = {"model": str(checkpoints["bert"]), "task": str(table), "store": str(store)}
    named = {"text": "first", "label": "label", "limit": 24, "tuners": ["probe", "sherl", "lst"]}
    api.extract(**options, **named)
    return options


def words(options: dict[str, str]) -> list[str]:
    return [w for name, value in options.items() for w in (f"--{name}", value)]


NOTHING = {"init": ("magnitude", "lst"), "alpha": (32, "e3va"), "blend": ("max", "sherl"), "recompute": (True, "sherl"),
           "lasso": (0.1, "head2toe"), "reduction": (4, "lst")}  # fmt: skip


@pytest.mark.parametrize("option", NOTHING)
def test_options_of_other_tuners_are_refused(stored, option, tmp_path):
    value, owner = NOTHING[option]
    flag = [f"--{option}"] if value is True else [f"--{option}", value]
    plain = ["train", *words(stored), "--tuner", "probe", "--epochs", 1, "--out", tmp_path / "run"]
    refused(run(*plain, *flag), f"--{option}", owner, "probe")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**stored, "tuner": "probe", option: value}))
    refused(
        run("train", "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "run"), f"--{option}", owner, "probe"
    )
    with pytest.raises(UserError, match=f"--{option}.*{owner}"):
        api.train(**stored, tuner="probe", epochs=1, out=str(tmp_path / "run"), **{option: value})
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_every_one_is_named_at_once(stored):
    line = refused(
        run("train", *words(stored), "--tuner", "probe", "--init", "magnitude", "--alpha", 32, "--blend", "max")
    )
    for word in ("--init", "lst", "--alpha", "e3va", "--blend", "sherl"):
        assert word in line


def test_extraction_refuses_what_none_of_its_tuners_has(stored, tmp_path):
    common = ["extract", *words({**stored, "store": str(tmp_path / "store")}), "--text", "first", "--label", "label"]
    refused(run(*common, "--for", "probe", "--init", "magnitude"), "--init", "lst", "probe")
    refused(run(*common, "--for", "probe,lst", "--prune", "aligned"), "--prune", "--init")
    assert not (tmp_path / "store").exists()
    columns = {"text": "first", "label": "label"}
    # What training alone takes may stand in a recipe that both are given.
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**stored, **columns, "alpha": 8, "tier": "disk"}))
    assert run("extract", "--recipe", tmp_path / "recipe.yaml", "--for", "probe,sherl", "--limit", 24).exit_code == 0


def test_options_without_a_use_in_this_run(stored, checkpoints, table, tmp_path):
    live = ["train", *words(stored), "--tuner", "probe", "--live", "--epochs", 1, "--out", tmp_path / "run"]
    for flag in (["--tier", "disk"], ["--host-memory", "1GB"], ["--scheduler", "tcp://127.0.0.1:1"]):
        refused(run(*live, *flag), flag[0], "--live")
    t5 = {**stored, "model": str(checkpoints["t5"]), "store": str(tmp_path / "t5")}
    api.extract(**t5, text="first", label="label", limit=8, tuners=["sherl"])
    refused(
        run("train", *words(t5), "--tuner", "sherl", "--pooling", "first", "--out", tmp_path / "run"), "--pooling", "t5"
    )
    assert not (tmp_path / "run").exists()


def test_a_separator_of_rows_that_were_read_without_one(stored, tmp_path):
    command = ["train", *words(stored), "--tuner", "probe", "--out", tmp_path / "run"]
    refused(run(*command, "--separator", ";"), "--separator was none, now ';'")


def test_compare_refuses_before_its_first_method_trains(stored, tmp_path):
    options = ["compare", *words(stored), "--live", "--tier", "disk", "--epochs", 1, "--out", tmp_path / "runs"]
    refused(run(*options, "--tuners", "partial-1,probe"), "--tier", "--live")
    assert not (tmp_path / "runs").exists()


def test_compare_gives_each_method_its_own_options(stored, tmp_path):
    options = ["compare", *words(stored), "--epochs", 1, "--out", tmp_path / "runs"]
    refused(run(*options, "--tuners", "probe,sherl", "--alpha", 8), "--alpha", "e3va", "probe, sherl")
    assert run(*options, "--tuners", "probe,sherl", "--blend", "max", "--gate", 0.2).exit_code == 0
    kept = {name: yaml.safe_load((tmp_path / "runs" / f"{name}-s0" / "recipe.yaml").read_text())
            for name in ("probe", "sherl")}  # fmt: skip
    assert (kept["sherl"]["tuner_options"]["blend"], kept["sherl"]["tuner_options"]["gate"]) == ("max", 0.2)
    assert kept["probe"]["tuner_options"] == {}


def test_plan_refuses_what_training_would(stored):
    refused(
        run("plan", *words(stored), "--text", "first", "--label", "label", "--tuner", "probe", "--alpha", 8), "e3va"
    )


def test_a_finished_run_that_once_took_such_an_option_is_still_read(stored, tmp_path):
    api.train(**stored, tuner="probe", epochs=1, out=str(tmp_path / "run"))
    file = tmp_path / "run" / "recipe.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "alpha": 32}))
    assert load_run(tmp_path / "run").evaluate("validation")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"host_memory": "nonsense"}, "nonsense"),
        ({"tier": "attic"}, "tier"),
        ({"device": "abacus"}, "device"),
        ({"scheduler": "nowhere://1"}, "scheduler"),
        ({"lr": 0.1}, "lr.*does nothing"),
        ({"tuner": "sherl"}, "tuner.*does nothing"),
        ({"batch-tokens": 9}, "batch_tokens.*does nothing"),
        ({"nonsense": 1}, "unknown option"),
    ],
)
def test_stream_refuses_wrong_options(stored, options, said):
    with pytest.raises(UserError, match=said):
        next(iter(api.stream(**stored, states=["encoder.3"], **options)))


def test_stream_refuses_at_the_call(stored):
    with pytest.raises(UserError, match="nonsense"):
        api.stream(**stored, states=["encoder.3"], host_memory="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="cuda"):
            api.stream(**stored, states=["encoder.3"], device="cuda")


def test_stream_hands_on_how_to_read(stored, monkeypatch):
    from pipeline.train.data.store_source import StoreSource

    seen = []
    original = StoreSource.__init__
    monkeypatch.setattr(StoreSource, "__init__", lambda *a, **k: (seen.append(a[0]), original(*a, **k))[1])
    ways = [{}, {"tier": "disk"}, {"host_memory": "0"}, {"tier": "host", "device": "cpu"}, {"group_by_length": True}]
    rows = [list(api.stream(**stored, states=["encoder.3"], batch_size=8, **how)) for how in ways]
    assert [source.tier for source in seen] == ["host", "disk", "disk", "host", "host"]
    assert seen[-1].options.group_by_length
    for found in rows[1:4]:
        for a, b in zip(rows[0], found, strict=True):
            assert torch.equal(a.states["encoder.3"], b.states["encoder.3"]) and np.array_equal(a.index, b.index)


def test_the_options_of_stream_are_options() -> None:
    assert set(STREAM_OPTIONS) <= set(field_names())
