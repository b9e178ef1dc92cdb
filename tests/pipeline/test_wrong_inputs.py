"""Inputs that a backbone cannot mean are refused at the door: words it has no tokenizer for, images given to a text
model and texts to an image model, rows of another shape than the task's."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline import api
from pipeline.extract.pretrained import Checkpoint
from pipeline.runs import load_run
from pipeline.store import UserError
from tests import tiny
from tests.pipeline.test_errors import refused, run


@pytest.fixture(scope="module")
def runs(checkpoints, table, pictures, tmp_path_factory) -> dict[str, Path]:
    """A finished run on pairs of texts, one on single texts, one on images."""
    base = tmp_path_factory.mktemp("runs")
    columns = {"pair": ["--text-pair", "second"], "single": []}
    for name, more in columns.items():
        source = shutil.copy(table, base / f"{name}.tsv")
        common = ["--model", checkpoints["bert"], "--task", source, "--text", "first", *more, "--label", "label",
                  "--store", base / "store"]  # fmt: skip
        for words in (["extract", *common, "--for", "probe", "--limit", 20],
                      ["train", *common, "--tuner", "probe", "--epochs", 1, "--out", base / name]):  # fmt: skip
            assert run(*words).exit_code == 0
    common = ["--model", checkpoints["cifar"], "--task", pictures, "--store", base / "store"]
    assert run("extract", *common, "--for", "probe", "--limit", 20).exit_code == 0
    assert run("train", *common, "--tuner", "probe", "--epochs", 1, "--out", base / "pictures").exit_code == 0
    return {name: base / name for name in ("pair", "single", "pictures")}


@pytest.mark.parametrize("backbone", tiny.CHECKPOINTS)
def test_a_checkpoint_without_its_tokenizer_is_refused(backbone, checkpoints, table, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(checkpoints[backbone], bare, ignore=shutil.ignore_patterns("*token*", "vocab*"))
    common = ["--model", bare, "--task", table, "--text", "first", "--label", "label", "--store", tmp_path / "store"]
    refused(run("extract", *common, "--for", "probe"), str(bare), "tokenizer")
    refused(run("train", *common, "--tuner", "probe", "--live", "--out", tmp_path / "run"), str(bare), "tokenizer")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare"]


def words_known(folder: Path, known: int) -> None:
    """A checkpoint whose tokenizer knows the first `known` of the words that texts are made of."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *tiny.WORDS[:known], "number"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for file in folder.glob("*token*"):
        file.unlink()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)


def test_unknown_words_and_samples_that_fall_together_are_warned_of(checkpoints, tmp_path):
    folder = tmp_path / "bert"
    shutil.copytree(checkpoints["bert"], folder)
    words_known(folder, known=1)
    rows = [f"{'a' if i % 2 else 'cat'} {i}\t{i % 2}" for i in range(40)]  # numbers are what tells them apart
    (tmp_path / "rows.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    said = api.extract(task=str(tmp_path / "rows.tsv"), model=str(folder), store=str(tmp_path / "store"))
    unknown, together = said["warnings"]
    assert "75% of the tokens" in unknown and "[UNK]" in unknown
    assert "40 distinct texts" in together and "6 distinct samples" in together  # two a split
    lines = run("extract", "--task", tmp_path / "rows.tsv", "--model", folder, "--store", tmp_path / "store").stderr
    assert f"warning: {unknown}" in lines and f"warning: {together}" in lines


def test_ordinary_texts_are_not_warned_of(checkpoints, table, tmp_path):
    options = {"text": "first", "label": "label", "tuners": ["probe"], "store": str(tmp_path / "store")}
    assert api.extract(task=str(table), model=str(checkpoints["t5"]), limit=20, **options)["warnings"] == []


def test_a_tokenizer_of_another_model_is_refused(checkpoints, table, tmp_path):
    small = tmp_path / "small"
    shutil.copytree(checkpoints["bert"], small)
    from transformers import BertConfig, BertModel

    few = BertConfig.from_pretrained(small)
    few.vocab_size = 50
    BertModel(few).save_pretrained(small)
    refused(run("extract", "--model", small, "--task", table, "--text", "first", "--store", tmp_path / "store"),
            "tokenizer", "50")  # fmt: skip
    assert not (tmp_path / "store").exists()


def test_pictures_for_a_text_model_are_refused(checkpoints, pictures, tmp_path):
    names = [f"{p.relative_to(pictures).as_posix()},{p.parent.name}" for p in sorted(pictures.rglob("*.png"))]
    (tmp_path / "names.csv").write_text("\n".join(["file,side", *names]) + "\n")
    of_folder = ["--task", pictures]
    of_table = ["--task", tmp_path / "names.csv", "--text", "file", "--label", "side"]
    for task in (of_folder, of_table):
        common = ["--model", checkpoints["bert"], *task, "--store", tmp_path / "store"]
        refused(run("extract", *common, "--for", "probe"), "images", ".png", "bert", "text")
        refused(run("train", *common, "--tuner", "probe", "--live", "--out", tmp_path / "run"), "images", ".png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["names.csv"]


def test_states_of_file_names_read_as_text_are_not_trained_on(checkpoints, pictures, tmp_path, monkeypatch):
    # As a store of an earlier version may hold them.
    common = ["--model", checkpoints["bert"], "--task", pictures, "--store", tmp_path / "store"]
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.commands.prepare.refuse_other_kind", lambda *given: None)
        assert run("extract", *common, "--for", "probe", "--limit", 20).exit_code == 0
    refused(run("train", *common, "--tuner", "probe", "--out", tmp_path / "run"), "images", ".png")
    assert not (tmp_path / "run").exists()


def test_texts_for_an_image_model_are_refused(checkpoints, table, tmp_path):
    common = ["--model", checkpoints["cifar"], "--task", table, "--text", "first", "--label", "label", "--store",
              tmp_path / "store"]  # fmt: skip
    for more in ([], ["--skip-bad"]):
        line = refused(run("extract", *common, "--for", "probe", *more), "name no images", "resnet")
        assert "--skip-bad" not in line
    refused(run("train", *common, "--tuner", "probe", "--live", "--out", tmp_path / "run"), "name no images")
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_bad_pictures_is_refused_however_asked(checkpoints, pictures, tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        (tmp_path / "bad" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bad" / name).write_bytes(b"no image")
    common = ["--model", checkpoints["cifar"], "--task", tmp_path / "bad", "--store", tmp_path / "store"]
    refused(run("extract", *common, "--for", "probe", "--skip-bad"), "none of the 2 images")
    assert not (tmp_path / "store").exists()


def test_predict_refuses_inputs_of_the_other_kind(runs, pictures, table, tmp_path):
    refused(run("predict", runs["single"], "--input", pictures), "images", ".png", "bert")
    refused(run("predict", runs["single"], "--input", next(pictures.rglob("*.png"))), "images", ".png")
    refused(run("predict", runs["pictures"], "--input", table, "--text", "first"), "images", "resnet")
    (tmp_path / "none").mkdir()
    refused(run("predict", runs["pictures"], "--input", tmp_path / "none"), "no images")
    one = run("predict", runs["pictures"], "--input", next(pictures.rglob("*.png")))
    assert one.exit_code == 0 and one.stdout.split()[-2] in ("left", "upper")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("a cat sees", "list of rows"),
        (["a cat sees"], "row 0.*one text.*first, second"),
        ([("a cat", "a dog"), ("a cat",)], "row 1.*1 field.*first, second"),
        ([("a", "b", "c")], "row 0.*3 fields"),
        ([("a cat", None)], "row 0.*'second'.*NoneType"),
        ([("a cat", 3)], "row 0.*'second'.*int"),
        ([5], "row 0.*int"),
        ([("a cat", "\ud800")], "row 0.*'second'"),
    ],
)
def test_rows_of_another_shape_than_a_pair_are_refused(runs, rows, words):
    with pytest.raises(UserError, match=words):
        load_run(runs["pair"]).predict(rows)


def test_rows_of_single_texts(runs, pictures):
    single = load_run(runs["single"])
    texts = tiny.sentences(4)
    assert single.predict(texts) == single.predict([(t,) for t in texts]) == single.predict([[t] for t in texts])
    assert single.predict(np.array(texts)) == single.predict(texts)
    with pytest.raises(UserError, match=r"row 0.*2 fields"):
        single.predict([("a", "b")])
    with pytest.raises(UserError, match="list of rows"):
        single.predict("a cat")
    assert single.predict([]) == []
    with pytest.raises(UserError, match=r"row 0.*2 fields"):  # views are of training
        load_run(runs["pictures"]).predict([("left/000.png", "1")], pictures)


def test_a_whole_tokenizer_is_still_taken(checkpoints):
    for backbone in tiny.CHECKPOINTS:
        assert len(Checkpoint(checkpoints[backbone], backbone).tokenizer("a cat")["input_ids"]) > 1
