"""The stream as users know streams: sized, iterated again and again, in a loop, in a loader's workers and in trainers;
every sample exactly once an epoch, and on from the middle."""

from __future__ import annotations

import copy
import csv
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import pipeline
from pipeline.store.errors import MissingStates, Notice, SpaceMismatch, StoreError, UserError

ROWS = 40
OPTIONS = {"task": "pairs", "states": "encoder.3", "batch_size": 7}


@pytest.fixture(scope="module")
def features(checkpoints, table, tmp_path_factory) -> pipeline.FeatureStore:
    """40 training rows of pairs, in six batches of 7."""
    features = pipeline.open_store(tmp_path_factory.mktemp("stream") / "store", create=True)
    named = {"text": "first", "text_pair": "second", "label": "label", "limit": ROWS, "tuners": ["probe"]}
    features.extract(str(table), model=str(checkpoints["bert"]), **named)
    return features


def indices(batches) -> list[list[int]]:
    return [batch.index.tolist() for batch in batches]


def each_once(batches: list[list[int]]) -> bool:
    return sorted(i for batch in batches for i in batch) == list(range(ROWS))


def test_a_stream_is_a_sized_dataset_that_goes_on(features):
    stream = features.stream(**OPTIONS)
    assert isinstance(stream, IterableDataset) and isinstance(stream, pipeline.Stream)
    epochs = [indices(stream) for _ in range(3)]
    assert all(len(e) == len(stream) == 6 and each_once(e) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert indices(features.stream(**OPTIONS, epochs=3)) == [batch for e in epochs for batch in e]
    assert len(features.stream(**OPTIONS, epochs=3)) == 18
    stream.set_epoch(1)
    assert indices(stream) == epochs[1]
    next(iter(stream))  # a look at a batch takes nothing away
    assert indices(islice(stream, len(stream))) == epochs[2]
    assert not any(indices(stream) == e for e in epochs), "who counts the batches has had the epoch, too"


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_loader_hands_out_the_batches_of_one_process(features, workers):
    alone, stream = features.stream(**OPTIONS), features.stream(**OPTIONS)
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    assert len(loader) == 6
    for epoch in range(3):
        stream.set_epoch(epoch)
        found = indices(loader)
        assert each_once(found) and found == indices(alone)
    batch = next(iter(loader))
    assert batch.states["encoder.3"].shape == (batch.lengths["encoder"].sum(), 32)
    assert batch.mean("encoder.3").shape == (len(batch), 32)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_loader_goes_on_in_the_middle(features, workers):
    options = {**OPTIONS, "epochs": 2}
    whole = indices(features.stream(**options))
    stream = features.stream(**options)
    taken = iter(DataLoader(stream, batch_size=None, num_workers=workers))
    first = [next(taken).index.tolist() for _ in range(8)]
    if workers:
        with pytest.raises(UserError, match=r"state_dict\(batch="):
            stream.state_dict()
    state = stream.state_dict(batch=8) if workers else stream.state_dict()
    assert (state["epoch"], state["batch"]) == (1, 2)
    other = features.stream(**options)
    other.load_state_dict(state)
    assert first + indices(DataLoader(other, batch_size=None, num_workers=workers)) == whole


def test_a_worker_begins_where_its_own_state_stood(features, monkeypatch):
    """What a loader that keeps the states of its workers does; two workers share the memory of one stream."""
    from types import SimpleNamespace

    from pipeline.train.data import iterable

    whole, stream = indices(features.stream(**OPTIONS)), features.stream(**OPTIONS)
    workers = [stream, copy.copy(stream)]
    state = {"epoch": 0, "end": 1, "order": stream.state_dict()["order"]}
    info = SimpleNamespace(num_workers=2)
    monkeypatch.setattr(iterable, "get_worker_info", lambda: info)
    for worker, batch in zip(workers, (4, 2), strict=True):  # three were taken: two of the first, one of the second
        worker.load_state_dict({**state, "batch": batch})
    found = []
    for info.id, worker in enumerate(workers):
        found.append(indices(worker))
    assert found == [whole[4::2], whole[3::2]]
    info.id = 0
    assert indices(stream) == whole[::2], "the state is that of one iteration"
    stream.load_state_dict({**state, "epoch": 1, "batch": 2})  # another of more workers has the last batch still
    assert indices(stream) == []


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_loader_that_keeps_states(features, workers):
    reason = "torchdata is not installed: its StatefulDataLoader not tested"
    loaders = pytest.importorskip("torchdata.stateful_dataloader", reason=reason)

    def loader():
        return loaders.StatefulDataLoader(features.stream(**OPTIONS), batch_size=None, num_workers=workers)

    whole, first = indices(features.stream(**OPTIONS)), loader()
    for number, _ in enumerate(first, 1):
        if number < len(whole):
            other = loader()
            other.load_state_dict(first.state_dict())
            assert indices(other) == whole[number:]


def test_a_loop_goes_on_in_the_middle(features):
    whole = indices(features.stream(**OPTIONS, seed=3))
    stream = features.stream(**OPTIONS, seed=3)
    for number, _ in enumerate(stream, 1):
        if number == 4:
            state = copy.deepcopy(stream.state_dict())
            break
    other = features.stream(**OPTIONS, seed=3)
    other.load_state_dict(state)
    other.set_epoch(state["epoch"])  # as a loop over epochs does
    assert whole[:4] + indices(other) == whole
    assert each_once(indices(other))
    assert other.state_dict()["epoch"] == 2 and other.state_dict()["batch"] == 0
    # Taken while the last batch is in hand: nothing of the epoch is left.
    for _ in other:
        state = other.state_dict()
    stream.load_state_dict(state)
    other.set_epoch(3)
    assert indices(stream) == indices(other)


def test_a_state_of_another_stream_is_refused(features):
    state = features.stream(**OPTIONS).state_dict()
    for options in ({"seed": 1}, {"batch_size": 8}, {"limit": 30}, {"split": "validation"}):
        with pytest.raises(UserError, match="state of a stream with other samples"):
            features.stream(**{**OPTIONS, **options}).load_state_dict(state)
    stream = features.stream(**OPTIONS)
    for wrong in ({}, {**state, "epoch": -1}, {**state, "batch": 99}, {**state, "end": "x"}):
        with pytest.raises(UserError, match="state"):
            stream.load_state_dict(wrong)
    with pytest.raises(UserError, match="epoch"):
        stream.set_epoch(-1)
    with pytest.raises(UserError, match="epochs"):
        features.stream(**OPTIONS, epochs=0)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"format": "float32"}, SpaceMismatch, 'format is "float16", asked for "float32"'),
        ({"task": "pears"}, MissingStates, "no states of task 'pears'; did you mean pairs?; extract first"),
        ({"model": "gpt9"}, MissingStates, "no states of task 'pairs' by model 'gpt9'"),
        ({"label": "second"}, MissingStates, "--label was 'label', now 'second'; extract first"),
    ],
)
def test_what_is_not_stored_is_told_without_a_tuner_that_nobody_named(features, options, kind, said):
    """The extraction for the default tuner would store other states than those that are asked for."""
    with pytest.raises(StoreError) as caught:
        features.stream(**{**OPTIONS, **options})
    line = str(caught.value)
    assert type(caught.value) is kind and said in line and "sherl" not in line and "\n" not in line
    assert ("`pipeline extract --for TUNER`" in line) == (kind is MissingStates)


def test_a_warning_names_the_line_that_asked_for_the_stream(features):
    with pytest.warns(Notice, match="--limit 999") as said:
        pipeline.api.stream(**OPTIONS, store=features.store.where, limit=999)
    assert said[0].filename == __file__


def test_a_stream_of_states_reads_no_weights(features, monkeypatch):
    def refuse(self, digest, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(pipeline.Store, "load_tensors", refuse)
    assert each_once(indices(features.stream(**OPTIONS)))
    with pytest.raises(AssertionError, match="tail"):
        features.train(task="pairs", tuner="probe")


def test_workers_that_live_on_hear_of_the_epoch(features):
    alone, stream = features.stream(**OPTIONS), features.stream(**OPTIONS)
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch in (0, 2, 1):
        alone.set_epoch(epoch)
        stream.set_epoch(epoch)
        assert indices(loader) == indices(alone)


def test_a_stream_can_be_sent_to_another_process(features):
    stream = features.stream(**OPTIONS)
    expected = indices(stream)  # its blocks are in memory now
    sent = pickle.dumps(stream)
    assert len(sent) < 40_000
    again = pickle.loads(sent)
    again.set_epoch(0)
    assert indices(again) == expected


@pytest.mark.matrix  # such a worker imports everything anew: ten seconds
def test_spawned_workers_hear_of_the_epoch(features):
    alone, stream = features.stream(**OPTIONS), features.stream(**OPTIONS)
    how = {"multiprocessing_context": "spawn", "persistent_workers": True}
    loader = DataLoader(stream, batch_size=None, num_workers=1, **how)
    for epoch in (0, 2):
        alone.set_epoch(epoch)
        stream.set_epoch(epoch)
        assert indices(loader) == indices(alone)


def collate(found: list[pipeline.Batch]) -> dict[str, torch.Tensor]:
    """One batch of the stream → what a Hugging Face model takes."""
    (batch,) = found
    return {"x": batch.mean("encoder.3"), "labels": batch.targets["label"], "index": torch.from_numpy(batch.index)}


class Probe(torch.nn.Module):
    """A linear probe that remembers which samples it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = torch.nn.Linear(32, 2), []

    def forward(self, x, labels, index):
        self.seen.append(index.tolist())
        return {"loss": torch.nn.functional.cross_entropy(self.linear(x), labels)}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_hugging_face_trainer(features, tmp_path, workers):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    def trainer(**options: object) -> Trainer:
        common = {"per_device_train_batch_size": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True}
        common |= {"remove_unused_columns": False, "num_train_epochs": 2, "save_steps": 8, "logging_steps": 1000}
        arguments = TrainingArguments(str(tmp_path), **{**common, "dataloader_num_workers": workers, **options})
        return Trainer(Probe(), arguments, data_collator=collate, train_dataset=features.stream(**OPTIONS))

    whole = trainer()
    whole.train()
    seen = whole.model.seen
    assert seen == indices(features.stream(**OPTIONS, epochs=2)) and each_once(seen[:6]) and each_once(seen[6:])
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert resumed.model.seen == seen[8:]


@pytest.mark.parametrize("way", ["stream", "loader", "loader that keeps states"])
def test_lightning(features, tmp_path, way):
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed: training with it not tested")

    class Module(lightning.LightningModule):
        def __init__(self, stream) -> None:
            super().__init__()
            self.linear, self.seen, self.stream = torch.nn.Linear(32, 2), [], stream

        def on_train_epoch_start(self):
            self.stream.set_epoch(self.current_epoch)

        def training_step(self, batch, number):
            self.seen.append(batch.index.tolist())
            return torch.nn.functional.cross_entropy(self.linear(batch.mean("encoder.3")), batch.targets["label"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def fit(path=None):
        stream = features.stream(**OPTIONS)
        loader = stream
        if way == "loader":
            loader = DataLoader(stream, batch_size=None, num_workers=2)
        elif way != "stream":
            reason = "torchdata is not installed: its StatefulDataLoader not tested"
            loaders = pytest.importorskip("torchdata.stateful_dataloader", reason=reason)
            loader = loaders.StatefulDataLoader(stream, batch_size=None, num_workers=2)
        module = Module(stream)
        save = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=8, save_top_k=-1)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
        lightning.Trainer(callbacks=[save], max_epochs=3, **quiet).fit(module, loader, ckpt_path=path)
        return module.seen

    expected = indices(features.stream(**OPTIONS, epochs=3))
    assert fit() == expected
    if way == "loader":  # Lightning warns that it is not resumable: docs/streams.md
        return
    assert fit(str(tmp_path / "step=8.ckpt")) == expected[8:]


def test_a_state_by_its_name_alone_and_reprs_that_fit_a_line(features, tmp_path):
    batch = next(iter(features.stream(**OPTIONS)))
    assert list(batch.states) == ["encoder.3"]
    run = features.train(task="pairs", tuner="probe", epochs=1, out=str(tmp_path / "run"))
    (space,) = features.spaces()
    shown = {kind: repr(thing) for kind, thing in (
        ("FeatureStore", features), ("Store", features.store), ("Space", space), ("Batch", batch), ("Run", run),
        ("Stream", features.stream(**OPTIONS)),
    )}  # fmt: skip
    for kind, text in shown.items():
        assert text.startswith(f"{kind}(") and len(text) < 300 and "\n" not in text and "tensor(" not in text, text
    assert space.id[:12] in shown["Space"] and "float16" in shown["Space"]
    for word in ("7 samples", "encoder.3", "label", "float32", "cpu"):
        assert word in shown["Batch"]
    for word in ("pairs train", "40 samples", "6 batches of 7", "encoder.3"):
        assert word in shown["Stream"]


def unlabelled(path: Path, labels: list[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = [(f"a sentence of number {i}", label) for i, label in enumerate(labels)]
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def test_rows_without_labels_give_batches_without_targets(checkpoints, tmp_path, recwarn):
    features = pipeline.open_store(tmp_path / "store", create=True)
    train = unlabelled(tmp_path / "rows.csv", ["no", "yes"] * 6)
    test = unlabelled(tmp_path / "test.csv", [""] * 5)
    options = {"model": str(checkpoints["bert"]), "text": "text", "label": "label", "tuners": ["probe"]}
    features.extract(str(train), test=str(test), **options)
    for workers in (0, 1):
        stream = features.stream(task="rows", split="test", states="encoder.3")
        (batch,) = DataLoader(stream, batch_size=None, num_workers=workers)
        assert batch.targets is None and sorted(batch.index.tolist()) == list(range(5))
        assert batch.mean("encoder.3").shape == (5, 32)
    assert not [w for w in recwarn if issubclass(w.category, Notice)]
    some = unlabelled(tmp_path / "some.csv", ["no", "", "yes", "", ""])
    features = pipeline.open_store(tmp_path / "other", create=True)
    features.extract(str(train), test=str(some), **options)
    with pytest.warns(Notice, match="3 of 5 test rows have no label"):
        stream = features.stream(task=str(train), split="test", states="encoder.3")
    assert next(iter(stream)).targets is None


def test_status_lists_the_states(features):
    from pipeline.cli.store_report import names_text, status_text, status_what

    assert "states: encoder.3" in status_text(status_what(features.store))
    many = [f"encoder.{i}" for i in range(13)] + ["decoder.1", "decoder.2", "stage1.norm", "encoder.15"]
    assert names_text(sorted(many)) == "decoder.1, decoder.2, encoder.0 … encoder.12, encoder.15, stage1.norm"


def test_a_gpu_stream_is_not_for_workers(features):
    stream = features.stream(**OPTIONS)
    stream._device = torch.device("cuda")
    with pytest.raises(UserError, match="num_workers=0"):
        list(DataLoader(stream, batch_size=None, num_workers=1))


def test_every_worker_leaves_room_for_the_others(monkeypatch):
    from types import SimpleNamespace

    from pipeline.train.data import tiers

    monkeypatch.setattr(tiers, "available_memory", lambda: 1000)
    assert tiers.choose(500, None) == "host"
    monkeypatch.setattr(tiers, "get_worker_info", lambda: SimpleNamespace(num_workers=4))
    assert [tiers.choose(n, None) for n in (125, 126)] == ["host", "disk"]


def test_what_a_batch_makes_of_rows():
    rows = torch.randn(9, 4)
    lengths = np.array([2, 0, 1, 6])
    batch = pipeline.Batch({"encoder.1": rows.half()}, {}, {"encoder": lengths})
    rows = rows.half().float()
    samples = list(rows.split(lengths.tolist()))
    zero = torch.zeros(4)
    makes = {"mean": lambda x: x.mean(0), "max": lambda x: x.amax(0), "first": lambda x: x[0], "last": lambda x: x[-1]}
    for name, make in makes.items():
        found = getattr(batch, name)("encoder.1")
        expected = torch.stack([make(x) if len(x) else zero for x in samples])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)
    padded, mask = batch.pad("encoder.1", -1.0)
    assert padded.shape == (4, 6, 4) and mask.sum(1).tolist() == lengths.tolist()
    assert torch.equal(padded[mask], rows) and bool((padded[~mask] == -1).all())
    with pytest.raises(UserError, match=r"encoder\.2.*encoder\.1"):
        batch.mean("encoder.2")
