"""Bad input: one clear line on stderr, a non-zero exit, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from pipeline.cli.main import main


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def refused(result: Result, *words: str) -> str:
    """The one line of a refusal; it names every one of `words`."""
    assert result.exit_code != 0
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    lines = [line for line in result.stderr.splitlines() if line.startswith(("error:", "Error:"))]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


@pytest.fixture
def common(checkpoints, table, tmp_path) -> list[object]:
    return ["--model", checkpoints["bert"], "--task", table, "--text", "first", "--text-pair", "second", "--label",
            "label", "--store", tmp_path / "store"]  # fmt: skip


@pytest.fixture(scope="module")
def stored(checkpoints, table, tmp_path_factory) -> list[object]:
    """Options of a store with the table's states for SHERL."""
    store = tmp_path_factory.mktemp("stored") / "store"
    options = ["--model", checkpoints["bert"], "--task", table, "--text", "first", "--text-pair", "second", "--label",
               "label", "--store", store]  # fmt: skip
    result = run("extract", *options, "--for", "probe")
    assert result.exit_code == 0, result.output
    return options


def train_options(stored: list[object]) -> list[object]:
    return [*stored[:4], *stored[-2:]]


def replaced(options: list[object], name: str, value: object) -> list[object]:
    out = list(options)
    out[out.index(name) + 1] = value
    return out


def test_unknown_names_offer_the_nearest(common, tmp_path):
    refused(run("extract", *replaced(common, "--model", "t5-bas")), "t5-bas", "t5-base")
    refused(run("extract", "--model", "minilm", "--task", "sst", "--store", tmp_path / "s"), "'sst'", "sst2")
    refused(run("extract", *common, "--for", "shrel"), "shrel", "sherl")
    refused(run("train", *train_options(common), "--tuner", "ladder"), "ladder")
    assert not (tmp_path / "store").exists()


def test_no_network_says_how_to_use_a_folder(common, tmp_path):
    refused(run("extract", *replaced(common, "--model", "t5-base")), "hub", "--model FOLDER")
    assert not (tmp_path / "store").exists()


def test_missing_options_and_columns(common, tmp_path):
    refused(run("extract", "--model", "minilm"), "--task")
    refused(run("extract", *replaced(common, "--text", "nonsense")), "nonsense", "first, second, label")
    refused(run("extract", *common, "--limit", 0), "--limit", "0")
    refused(run("extract", *common, "--format", "float8"), "float8")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty"]),
        (b"first\tsecond\tlabel\n", ["no rows"]),
        (b"first\tsecond\tlabel\na\tb\tyes\n\xff\xfe\tb\tno\n", ["UTF-8", "line 3"]),
        (b"first\tsecond\tlabel\na\tb\tyes\na\tb\n", ["line 3"]),
        (b"first\tsecond\tlabel\n" + b"a\tb\tyes\n" * 20, ["label"]),
    ],
)
def test_broken_tables(common, tmp_path, content, words):
    bad = tmp_path / "bad.tsv"
    bad.write_bytes(content)
    refused(run("extract", *replaced(common, "--task", bad)), "bad", *words)
    assert not (tmp_path / "store").exists()


def test_unknown_label_of_a_validation_file(common, tmp_path):
    other = tmp_path / "other.tsv"
    other.write_text("first\tsecond\tlabel\na\tb\tperhaps\n")
    refused(run("extract", *common, "--validation", other), "perhaps")


def test_long_texts_are_counted_and_warned_about(common):
    result = run("extract", *common, "--max-length", 8, "--for", "probe", "--limit", 5)
    assert result.exit_code == 0
    assert "texts are longer than 8 tokens (--max-length) and were cut" in result.stderr


def test_a_text_cut_by_the_model_is_not_blamed_on_the_option(common, tmp_path):
    long = tmp_path / "long.tsv"
    long.write_text("first\tsecond\tlabel\n" + "".join(f"{'word ' * 400}\tb\t{i % 2}\n" for i in range(6)))
    result = run("extract", *replaced(common, "--task", long), "--max-length", 5000, "--for", "probe")
    assert result.exit_code == 0, result.output
    assert "(all that the model takes) and were cut" in result.stderr


def test_a_length_without_room_for_text_is_refused(common, tmp_path):
    # The tokenizer would not cut pairs at all, and of single texts nothing would be left.
    refused(run("extract", *common, "--max-length", 3), "--max-length 3", "3 marks", "no room")
    refused(run("extract", *common[:6], *common[8:], "--max-length", 2), "--max-length 2", "2 marks")
    assert not (tmp_path / "store").exists()


def test_what_the_label_is_taken_for_is_said(common, tmp_path):
    numbers = tmp_path / "numbers.csv"
    rows = [f"text {i},{i / 7:.3f}" for i in range(60)]
    options = ["--task", numbers, "--text", "sentence", "--label", "score", "--for", "probe", *common[:2], *common[-2:]]
    numbers.write_text("\n".join(["sentence,score", *rows]) + "\n")
    assert "label: a number" in run("extract", *options).stderr
    numbers.write_text("\n".join(["sentence,score", *rows[1:], "one more,n/a"]) + "\n")
    shown = run("extract", *options).stderr
    assert (
        "label: 60 classes" in shown
        and "warning: 60 classes for 48 rows" in shown
        and "--objective regression" in shown
    )
    assert "2 classes (" in run("extract", *common, "--for", "probe").stderr


def test_paths_that_are_no_store(common, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("x")
    refused(run("extract", *replaced(common, "--store", tmp_path / "full")), "full")
    refused(run("train", *replaced(train_options(common), "--store", tmp_path / "nowhere")), "nowhere")
    refused(run("store", "status", "--store", tmp_path / "full"), "full")
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["something"]


def test_a_newer_store_is_refused(stored, tmp_path):
    newer = tmp_path / "newer"
    shutil.copytree(stored[-1], newer)
    marker = json.loads((newer / "store.json").read_text())
    (newer / "store.json").write_text(json.dumps({**marker, "format": 99}))
    refused(run("train", *replaced(train_options(stored), "--store", newer)), "99", "newer")


def test_a_space_that_differs_names_field_and_both_values(stored):
    refused(run("train", *train_options(stored), "--format", "int8"), "format", "int8", "float16")
    refused(run("train", *train_options(stored), "--max-length", 64), "max_length", "64", "128")


def test_changed_weights_are_noticed(stored, checkpoints, tmp_path):
    changed = tmp_path / "bert"
    shutil.copytree(checkpoints["bert"], changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["encoder.layer.2.output.dense.bias"][0] += 1e-3
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    refused(run("train", *replaced(train_options(stored), "--model", changed)), "weights")


def test_states_not_extracted_say_the_command(stored):
    refused(run("train", *train_options(stored), "--tuner", "lst", "--reduction", 5), "reduction", "32", "5")
    line = refused(run("train", *train_options(stored), "--tuner", "lst", "--reduction", 4), "pipeline extract")
    assert "--for lst" in line


def test_nan_from_the_backbone_stops_and_names_sample_and_layer(common, checkpoints, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints["bert"], broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["encoder.layer.1.output.LayerNorm.bias"].fill_(torch.nan)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    result = run("extract", *replaced(common, "--model", broken))
    refused(result, "encoder.1", "row", "not finite")
    assert not list((tmp_path / "store").rglob("manifest.json")) or not list((tmp_path / "store").rglob("segments/*/*"))


def test_missing_weights_are_not_run_at_random(common, checkpoints, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints["bert"], broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    refused(run("extract", *replaced(common, "--model", broken)), "missing", "encoder.layer.1.output.dense.weight")
    assert not (tmp_path / "store").exists()


def test_a_full_disk_keeps_the_store_whole(common, tmp_path, monkeypatch):
    import errno

    from pipeline.store.files.local import Files

    real = Files.write

    def full(self, name, *args, **kwargs):
        if "segments" in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, name, *args, **kwargs)

    monkeypatch.setattr(Files, "write", full)
    refused(run("extract", *common), "space")
    monkeypatch.undo()
    assert run("extract", *common).exit_code == 0


def test_recipes_are_checked(common, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1\n")
    refused(run("train", "--recipe", recipe), "learning_rate")
    recipe.write_text("epochs: many\n")
    refused(run("train", "--recipe", recipe), "epochs", "many")
    refused(run("train", "--recipe", tmp_path / "none.yaml"), "none.yaml")


def test_a_finished_run_is_not_overwritten(stored, tmp_path):
    options = [*train_options(stored), "--tuner", "probe", "--epochs", 1, "--out", tmp_path / "run"]
    assert run("train", *options).exit_code == 0
    before = (tmp_path / "run" / "metrics.json").read_text()
    refused(run("train", *options), "--overwrite")
    assert (tmp_path / "run" / "metrics.json").read_text() == before


def test_no_run_folder(tmp_path):
    refused(run("evaluate", tmp_path), "recipe.yaml")
    refused(run("predict", tmp_path / "gone", "--input", Path("x.tsv")), "recipe.yaml")
    (tmp_path / "my@3f2a91bc-lst-minilm-s0").mkdir()
    (tmp_path / "my@3f2a91bc-lst-minilm-s0" / "recipe.yaml").touch()
    refused(run("evaluate", tmp_path / "my-lst-minilm-s0"), "did you mean", "my@3f2a91bc-lst-minilm-s0")
