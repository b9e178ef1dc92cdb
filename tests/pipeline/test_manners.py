"""How the command line behaves: quiet, verbose, plain where nobody watches, helpful with names and next steps."""

from __future__ import annotations

import json
import shlex

import pytest
from click.shell_completion import BashComplete

from pipeline.catalog import BASELINES
from pipeline.cli.main import main
from pipeline.store import progress
from tests.pipeline.pages import parsed
from tests.pipeline.test_errors import common, refused, run  # noqa: F401 (a fixture)
from tests.pipeline.test_readme import own_table


@pytest.fixture
def mine(checkpoints, tmp_path, monkeypatch) -> list[object]:
    monkeypatch.chdir(tmp_path)
    own_table(tmp_path)
    return ["--model", checkpoints["bert"], "--task", "my.csv", "--text", "sentence", "--label", "label"]


def test_quiet_says_the_result_and_warnings_alone(mine, tmp_path):
    (tmp_path / "my.csv").write_text((tmp_path / "my.csv").read_text() + "a cat twice,yes\na cat twice,no\n")
    said = run("extract", *mine, "-q")
    assert said.exit_code == 0 and not said.stdout
    lines = said.stderr.splitlines()
    assert lines and all(line.startswith("warning") for line in lines)
    said = run("train", *mine[:4], "--tuner", "probe", "--epochs", 1, "--quiet")
    assert "next: pipeline evaluate" in said.stdout and "step" not in said.stderr and "train rows" not in said.stderr
    # The next command in the same process talks again.
    assert "to compute: 0" in run("extract", *mine).stderr


def test_verbose_says_when_and_where_from(mine):
    said = run("extract", *mine, "--verbose")
    assert said.exit_code == 0
    assert all(line.startswith("[") and " s] " in line for line in said.stderr.splitlines() if "samples" in line)
    said = run("extract", *mine[:-1], "nonsense", "-v")
    refused(run("extract", *mine[:-1], "nonsense"), "nonsense")
    assert said.exit_code != 0 and "Traceback" in said.stderr and "error: " in said.stderr
    refused(run("extract", *mine, "-v", "-q"), "--quiet and --verbose")


def test_train_says_what_it_learns(mine):
    run("extract", *mine)
    said = run("train", *mine[:4], "--tuner", "probe", "--epochs", 1)
    assert "probe on my (classification): " in said.stderr
    said = run("train", *mine[:4], "--tuner", "probe", "--epochs", 1, "--target-step", 2)
    assert "pipeline extract" not in refused(said, "--target-step 2", "leave it out")


def test_progress_is_plain_lines_where_nobody_watches(mine, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    said = run("extract", *mine, "--batch-size", 8)
    lines = [line for line in said.stderr.splitlines() if line.startswith("extract: ")]
    assert lines and "of 36 samples (" in lines[0] and "a second" in lines[0] and "\r" not in said.output
    said = run("train", *mine[:4], "--tuner", "probe", "--epochs", 1, "--batch-size", 8)
    assert "steps (" in said.stderr and "\r" not in said.output and "█" not in said.output
    monkeypatch.setattr(progress, "SECONDS", 1e6)
    said = run("train", *mine[:4], "--tuner", "probe", "--epochs", 1, "--seed", 1, "--batch-size", 8)
    assert "steps (" not in said.stderr and "\r" not in said.output and "epoch 1/1" in said.stderr


def test_extract_and_train_end_with_what_comes_next(mine, tmp_path):
    options = ["--for", "lst,probe", "--max-length", 20, "--format", "float32", "--store", tmp_path / "the store"]
    said = run("extract", *mine, *options)
    line = said.stderr.splitlines()[-1]
    assert line.startswith("next: pipeline train --model ") and "--tuner lst" in line
    parsed(line.removeprefix("next: "), main)
    said = run(*shlex.split(line)[2:], "--epochs", 1, "--out", "r un")
    assert said.exit_code == 0, said.output
    lines = said.stdout.splitlines()[-2:]
    assert lines == ["next: pipeline evaluate 'r un'", "next: pipeline predict 'r un' --input FILE"]
    assert run(*shlex.split(lines[0])[2:]).exit_code == 0
    assert run(*shlex.split(lines[1].replace("FILE", "new.csv"))[2:]).exit_code == 0


def test_rows_without_labels_have_no_next_training(mine, tmp_path):
    (tmp_path / "my.csv").write_text((tmp_path / "my.csv").read_text().replace("sentence,label", "sentence,other", 1))
    assert "next:" not in run("extract", *mine[:-2], "--for", "probe").stderr


def test_every_name_that_is_not_there_is_answered_with_the_nearest(mine, tmp_path):
    assert run("extract", *mine, "--for", "probe").exit_code == 0
    assert run("train", *mine[:4], "--tuner", "probe", "--epochs", 1, "--out", "r").exit_code == 0
    rest = ["--task", "my.csv", "--tuner", "probe", "--out", "new"]
    refused(run("train", "--model", mine[1], *rest, "--objective", "classfication"), "did you mean classification?")
    refused(run("train", "--model", mine[1], *rest, "--metric", "acuracy"), "did you mean accuracy?")
    refused(run("train", "--model", "brt", *rest), "did you mean bert?")
    refused(run("train", "--model", mine[1], "--task", "mye", "--tuner", "probe"), "did you mean my?")
    refused(run("train", *mine[:4], "--tuner", "prob"), "did you mean probe?")
    refused(run("train", *mine[:4], "--tuner", "probe", "--epoch", 3), "--epochs")
    refused(run("extract", *mine[:-1], "lable"), "did you mean label?")
    refused(run("evaluate", "r", "--split", "tets"), "did you mean test?")
    refused(run("evaluate", "rr"), "did you mean r?")
    refused(run("extarct"), "extract")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("config", "nearest"),
    [
        ({"model_type": "distilbert"}, "bert: BERT-like"),
        ({"model_type": "deberta-v2"}, "bert: BERT-like"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "llama: decoder-only"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "t5: T5"),
        ({"model_type": "beit"}, "vit: vision"),
    ],
)
def test_a_model_of_no_family_is_refused_with_what_works(config, nearest, mine, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    refused(run("extract", "--model", tmp_path / "m", *mine[2:]), config["model_type"], nearest, "@register_backbone")


def test_baselines_stand_beside_the_tuners():
    said = run("tuners").stdout
    assert all(f"\n{name} " in said for name in BASELINES) and said.index("lst ") < said.index("lora ")
    assert json.loads(run("tuners", "--json").stdout)["baselines"] == BASELINES


def test_a_shell_completes_names_and_options_of_the_chosen():
    def offered(words: str, last: str) -> list[str]:
        return [c.value for c in BashComplete(main, {}, "pipeline", "_X").get_completions(words.split(), last)]

    assert offered("", "tr") == ["train"]
    assert offered("train --tuner", "l") == ["lst"]
    assert offered("extract --for", "lst,pr") == ["lst,probe"]
    assert "t5-base" in offered("train --model", "t5-b") and "sst2" in offered("extract --task", "ss")
    assert offered("train --tuner lst", "--pru") == ["--prune"] and not offered("train --tuner probe", "--pru")
    assert offered("train --objective", "seg") == ["segmentation"]


def test_with_nothing_stored_the_extraction_for_all_methods_is_printed(mine, tmp_path):
    for command, methods in (("compare", "--tuners"), ("train", "--tuner")):
        names = "probe,lst,lora" if command == "compare" else "lst"
        said = refused(run(command, *mine, methods, names, "--store", tmp_path / "none"), "there is no store at")
        line = said.split("run: ", 1)[1]
        assert line.startswith("pipeline extract") and f"--for {'probe,lst' if command == 'compare' else 'lst'}" in line
        parsed(line, main)
