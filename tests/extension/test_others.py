"""A package of others goes the whole way from the command line, by --import and by entry point, without a line of ours.

Every command runs in a process of its own: what theirs has registered in one is of no help to another.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from transformers import DistilBertConfig, DistilBertModel

from pipeline import testing
from pipeline.cli.main import main
from pipeline.extract import plugins
from tests import forks, tiny

pytestmark = forks.needed
OTHERS = Path(__file__).parent / "others"


@pytest.fixture(scope="module")
def distil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distil")
    tokenizer = tiny._tokenizer("bert")
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, n_layers=3, n_heads=4, hidden_dim=64, max_position_embeddings=160,
        pad_token_id=0,
    )  # fmt: skip
    DistilBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


RUN = """
import json, sys
from tests.extension.test_others import found
json.dump(found(json.loads(sys.argv[1])), sys.stdout)
"""
Found = list[tuple[int, str, str]]


def found(lines: list[list[str]]) -> Found:
    """Status, stdout and stderr of each command line."""
    done = [CliRunner().invoke(main, line) for line in lines]
    return [(one.exit_code, one.stdout, one.stderr) for one in done]


def away(work: Callable[[], Any], path: str, cwd: Path) -> Any:
    """`work` in another process, where `path` can be imported from and no plug-in is loaded yet."""

    def there() -> Any:
        assert "others" not in sys.modules
        os.chdir(cwd)
        sys.path[:0] = [path] if path else []
        plugins.load_installed.cache_clear()
        return work()

    return forks.value_of(there)


def pipeline(*lines: list[object], path: str = "", cwd: Path, new: bool = False) -> Found:
    """What `found` gives in one other process, with `new` in one that has imported nothing yet."""
    words = [[str(w) for w in line] for line in lines]
    if not new:
        return away(lambda: found(words), path, cwd)
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*([path] if path else []), root]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(words)], env=env, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [tuple(one) for one in json.loads(done.stdout)]


def results(*lines: list[object], path: str = "", cwd: Path, new: bool = False) -> list[dict]:
    done = pipeline(*([*line, "--json"] for line in lines), path=path, cwd=cwd, new=new)
    assert [code for code, _, _ in done] == [0] * len(lines), done
    return [json.loads(out) for _, out, _ in done]


@pytest.mark.parametrize("way", ["import", "entry point"])
def test_the_whole_way(distil: Path, tmp_path: Path, way: str) -> None:
    if way == "import":
        package, path = tmp_path / "elsewhere" / "others", ""
        load = ["--import", package]
    else:
        package, load = tmp_path / "site" / "others", []
        path = str(tmp_path / "site")
        info = tmp_path / "site" / "others-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[pipeline.plugins]\nothers = others\n")
    shutil.copytree(OTHERS, package, ignore=shutil.ignore_patterns("__pycache__"))
    common = ["--model", distil, "--task", "word-parity", "--store", tmp_path / "store"]
    run = tmp_path / "run"
    extract = ["extract", *load, *common, "--for", "power"]
    own = ["--tuner", "power", "--exponent", 2, "--tuner-seed", 0.5, "--objective", "margin", "--margin", 0.7]
    train = ["train", *load, *common, *own, "--batch-size", 8, "--epochs", 2, "--out", run]
    extracted, trained = results(extract, train, path=path, cwd=tmp_path)
    assert extracted["computed"] == 40
    kept = yaml.safe_load((run / "recipe.yaml").read_text())
    assert kept["tuner_options"] == {"exponent": 2, "seed": 0.5}
    assert kept["objective_options"] == {"margin": 0.7, "pooling": "mean"}
    assert kept["imports"] == ([str(package)] if load else [])
    # A process that knows the run alone.
    (tmp_path / "new.csv").write_text("sentence\nthe old cat\na red house sees\n")
    scores, told, again, live = results(
        ["evaluate", run],
        ["predict", run, "--input", tmp_path / "new.csv"],
        ["train", "--recipe", run / "recipe.yaml", "--out", tmp_path / "again"],
        ["train", "--recipe", run / "recipe.yaml", "--live", "--out", tmp_path / "live"],
        path=path,
        cwd=tmp_path,
        new=way == "entry point",
    )
    assert scores["average"] == pytest.approx(trained["test"]["average"])
    assert len(told["predictions"]) == 2 and {e["label"] for e in told["predictions"]} <= {"even", "odd"}
    assert again["test"] == trained["test"] == live["test"]


def test_help_shows_their_options_and_a_mistake_is_one_line(tmp_path: Path) -> None:
    load = ["--import", OTHERS]
    wrong = (
        (["--import", tmp_path / "none.py"], "no such file"),
        (["--import", "no_such_module"], "No module named"),
        ([*load, "--tuner", "power", "--blend", "max"], "--blend is an option of sherl"),
        ([*load, "--tuner", "sherl", "--exponent", 2], "--exponent is an option of power"),
    )
    shown, *refusals = pipeline(
        ["train", *load, "--tuner", "power", "--objective", "margin", "--help"],
        *(["train", *words, "--task", "word-parity"] for words, _ in wrong),
        cwd=tmp_path,
    )
    for word in ("Tuner power:", "--exponent", "--tuner-seed", "Objective margin:", "--margin"):
        assert word in shown[1]
    for (code, _, err), (_, said) in zip(refusals, wrong, strict=True):
        assert code != 0 and said in err and err.count("error:") == 1


def test_a_broken_plug_in_stops_nobody_else(tmp_path: Path) -> None:
    info = tmp_path / "site" / "broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pipeline.plugins]\nbroken = not_there\n")
    ((code, out, err),) = pipeline(["tuners"], path=str(tmp_path / "site"), cwd=tmp_path)
    assert code == 0 and "sherl" in out and "plug-in broken (not_there) cannot be imported" in err


def test_our_tuners_train_on_their_backbone_or_say_at_the_door_why_not(distil: Path, tmp_path: Path) -> None:
    """LST by the general side blocks, which nobody wrote for this backbone."""
    common = ["--import", OTHERS, "--model", distil, "--task", "word-parity", "--store", tmp_path / "store"]
    lst = [*common, "--tuner", "lst", "--reduction", 4, "--epochs", 1, "--batch-size", 8]
    probe = [*common, "--tuner", "probe", "--epochs", 1, "--batch-size", 8]
    _, *runs, _ = results(
        ["extract", *common, "--format", "float32", "--for", "lst,probe", "--reduction", 4],
        *(
            ["train", *line, *live, "--out", tmp_path / f"{line[9]}{len(live)}"]
            for line in (lst, probe)
            for live in ([], ["--live"])
        ),
        ["store", "verify", "--deep", "--store", tmp_path / "store"],  # a backbone without a tail's weights too
        cwd=tmp_path,
    )
    for cached, live in zip(runs[::2], runs[1::2], strict=True):
        assert cached["trainable_parameters"] == live["trainable_parameters"] > 0
        assert cached["validation"] == pytest.approx(live["validation"], abs=1e-6)
    store = sorted(p.name for p in (tmp_path / "store").rglob("*"))
    lacks = "'sherl' needs a last block that can be run live, which distilbert backbones do not have"
    wrong = (
        (["extract", *common, "--for", "sherl"], lacks),
        (["train", *common, "--tuner", "sherl", "--out", tmp_path / "no"], lacks),
        (["plan", *common, "--tuner", "sherl"], lacks),
        (["compare", *common, "--tuners", "probe,sherl", "--out", tmp_path / "no"], lacks),
        (["compare", *common, "--tuners", "adapter", "--out", tmp_path / "no"], "adapter: it needs a list of blocks"),
        (["extract", *common, "--for", "lst", "--init", "magnitude"], "distilbert backbones have no pruning yet"),
        (["extract", *common, "--for", "lst", "--reduction", 5], "must be a divisor of the backbone's width 32, not 5"),
        (["train", *lst[:-6], "--reduction", 5, "--out", tmp_path / "no"], "must be a divisor of the backbone's width"),
    )
    for (code, _, err), (line, said) in zip(pipeline(*(line for line, _ in wrong), cwd=tmp_path), wrong, strict=True):
        assert code != 0 and said in err and err.count("error:") == 1, (line, err)
    assert sorted(p.name for p in (tmp_path / "store").rglob("*")) == store and not (tmp_path / "no").exists()


def test_theirs_go_through_the_conformance_suite_in_a_line_each(distil: Path, tmp_path: Path) -> None:

    def work() -> None:
        import others  # noqa: F401

        testing.conform("power", str(distil), exponent=1)
        testing.conform_backbone(str(distil), tuners=("lst", "probe", "unipt"))

    away(work, str(OTHERS.parent), tmp_path)
