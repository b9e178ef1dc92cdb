"""What every backbone must do, and every tuner on every backbone it works on, for those of others too:

    import my_tuners, my_backbones, pipeline.testing

    def test_mine():
        pipeline.testing.conform("mine", "folder/of/a/small/checkpoint")

    def test_my_backbone():
        pipeline.testing.conform_backbone("folder/of/a/small/checkpoint/of/it")

`Case` is one pair ready to run: `case.model(seed)` a fresh model, `case.batch()` six samples with live states.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.extract.backbones import Batch, Inputs, TextOptions, stream_of
from pipeline.extract.backbones.capabilities import LiveLast
from pipeline.extract.encoding import decode, encode
from pipeline.extract.pretrained import Checkpoint, checkpoint_for
from pipeline.extract.tasks import load_task
from pipeline.lookup.objective import class_objective
from pipeline.store import UserError
from pipeline.train.model import Model, late_weights, state_names, tail_for
from pipeline.train.objectives import Objective
from pipeline.train.tuners import tuner_class, tuner_config, tuner_names

TEXTS = (
    ("the old cat sees a dog", "a cat sleeps"),
    ("red", "never"),
    ("young birds always like the blue house under the tree", "they sing"),
    ("it runs", "not on the old red tree in a house"),
    ("a dog hears nothing", "nothing"),
    ("number six", "the end of it"),
)


def small_options(tuner: str) -> dict[str, Any]:
    """Options that fit a backbone of width 32."""
    known = {f.name for f in fields(tuner_class(tuner).config_class)}
    return {k: v for k, v in {"reduction": 4, "alpha": 2}.items() if k in known}


@dataclass
class Case:
    """A tuner on a backbone. `pictures`: a folder of images as a task, for backbones that see; `options`: of the tuner,
    those of `small_options` if not given."""

    checkpoint: Checkpoint
    tuner: str
    pictures: Path = Path()
    options: dict[str, Any] | None = None

    @cached_property
    def backbone(self) -> Any:
        return self.checkpoint.backbone

    @cached_property
    def loaded(self) -> Any:
        return self.backbone.load(self.checkpoint.folder, torch.float32, "sdpa", "cpu")

    @cached_property
    def config(self) -> Any:
        return tuner_config(self.tuner, small_options(self.tuner) if self.options is None else self.options)

    @cached_property
    def inputs(self) -> Inputs:
        if self.backbone.modality == "text":
            prompt = "task first: {0} second: {1}" if self.backbone.writes_text else ""
            answers = (self.chains, [i % 3 for i in range(len(TEXTS))]) if self.chains else ()
            return self.backbone.prepare(self.checkpoint.tokenizer, TEXTS, TextOptions(prompt), *answers)
        return self.images()

    def images(self) -> Inputs:
        """Six of the images."""
        names = load_task(str(self.pictures)).splits["train"].texts[:6]
        return self.backbone.prepare(self.checkpoint.tokenizer, names, TextOptions(root=str(self.pictures)))

    @cached_property
    def chains(self) -> list[list[int]]:
        if not self.backbone.writes_text:
            return []
        return self.backbone.candidates(self.checkpoint.tokenizer, ["0", "1", "2 3"])

    @cached_property
    def objective(self) -> Objective:
        return class_objective(self.backbone, tuner_class(self.tuner, self.backbone), self.chains or [()] * 3)

    def model(self, seed: int = 0) -> Model:
        return Model.build(self.tuner, self.config, self.backbone, self.tail, self.objective, seed)

    @cached_property
    def tail(self) -> Any:
        backbone = self.backbone
        late = late_weights(self.tuner, self.config, backbone, self.loaded)
        weights = backbone.tail_weights(self.loaded)
        return tail_for(self.tuner, self.config, backbone, backbone.attentions[0], weights, late)

    def batch(self, inputs: Inputs | None = None) -> Batch:
        if inputs is None:
            return replace(self._whole)
        return self._run(inputs)

    @cached_property
    def _whole(self) -> Batch:
        return self._run(self.inputs)

    def _run(self, inputs: Inputs) -> Batch:
        batch = inputs.batch()
        batch.states = self.backbone.run(self.loaded, batch, state_names(self.tuner, self.config, self.backbone))
        batch.targets = {"label": torch.arange(len(batch)) % 3}
        return replace(batch, pictures=None)  # a tuner cannot tell where states come from


def shapes(case: Case) -> None:
    model, batch = case.model(), case.batch()
    found, features = model(batch), model.tuner.features
    assert found.keys() == features.keys()
    for name, feature in features.items():
        expected = len(batch.layout(feature.stream).sample) if feature.stream else len(batch)
        assert found[name].shape == (expected, feature.width) and torch.isfinite(found[name]).all()
    assert len(model.objective.entries(model.predict(batch))) == len(batch)
    with torch.no_grad():
        around = model.eval().tuner.around(batch)  # what a report shows of it
    assert all(len(part) == len(batch) and torch.isfinite(part).all() for part in around)


def gradients_reach_the_tuner_and_never_the_frozen_weights(case: Case) -> None:
    model, batch = case.model(), case.batch()
    model.train()
    model.loss(batch).backward()
    frozen = list(model.tuner.tail.parameters())
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in frozen}
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(t.grad is None for t in batch.states.values())


def saved_state_gives_the_same_predictions(case: Case) -> None:
    model, other, batch = case.model(0), case.model(1), case.batch()
    other.load_trainable(model.trainable_state())
    model.eval(), other.eval()
    torch.testing.assert_close(model(batch), other(batch), rtol=0, atol=0)
    try:
        other.load_trainable({"nonsense": torch.zeros(1)})
    except UserError as error:
        assert "does not fit" in str(error)
    else:
        raise AssertionError("weights of another tuner were taken")


def weights_follow_from_the_seed(case: Case) -> None:
    one, two, other = (case.model(seed).trainable_state() for seed in (3, 3, 4))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


def smaller_formats_change_little(case: Case) -> None:
    model, batch = case.model().eval(), case.batch()
    loss = float(model.loss(batch).detach())
    for fmt, bound in (("float16", 1e-2), ("bfloat16", 5e-2), ("int8", 1e-1)):
        states = {k: decode(encode(v, fmt)) for k, v in batch.states.items()}
        assert abs(float(model.loss(replace(batch, states=states)).detach()) - loss) <= bound * abs(loss), fmt


def states_as_stored_give_the_same_step(case: Case) -> None:
    """Half-precision states straight from the store train as their float32 copies do, under autocast as well."""
    batch = case.batch()
    for dtype, mixed in itertools.product((torch.float16, torch.bfloat16), (False, True)):
        stored = replace(batch, states={k: v.to(dtype) for k, v in batch.states.items()})
        found = []
        for one in (stored, replace(stored, states={k: v.float() for k, v in stored.states.items()})):
            model = case.model().train()
            torch.manual_seed(0)
            with torch.autocast("cpu", dtype=dtype, enabled=mixed):
                loss = model.loss(one)
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        for narrow, wide in zip(*found, strict=True):
            torch.testing.assert_close(narrow, wide, rtol=1e-4, atol=1e-6)


def single_rows_and_zero_states_stay_finite(case: Case) -> None:
    batch = case.batch(case.inputs.take(np.array([0])))
    model = case.model().train()
    zero = replace(batch, states={k: torch.zeros_like(v) for k, v in batch.states.items()})
    for one in (batch, zero):
        model.loss(one).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    if case.backbone.modality == "text" and not case.backbone.writes_text:
        ids = {k: v[:1] for k, v in case.inputs.columns.items()}
        single = case.batch(Inputs({case.backbone.streams[0]: np.ones(1, np.int64)}, ids, np.zeros(1, bool)))
        model.loss(single).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def half_precision_training_stays_finite(case: Case) -> None:
    batch = case.batch()
    for dtype in (torch.bfloat16, torch.float16):
        model = case.model().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            with torch.autocast("cpu", dtype=dtype):
                loss = model.loss(batch)
            loss.backward()
            assert torch.isfinite(loss) and all(
                torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None
            )
            optimizer.step()
            optimizer.zero_grad()


def a_sample_does_not_see_the_others(case: Case) -> None:
    model, batch = case.model().eval(), case.batch()
    together, at = model(batch), dict.fromkeys(model.tuner.features, 0)
    for i in range(len(batch)):
        for name, alone in model(case.batch(case.inputs.take(np.array([i])))).items():
            own = together[name][at[name] : at[name] + len(alone)]
            torch.testing.assert_close(alone, own, rtol=1e-3, atol=1e-4)
            at[name] += len(alone)


def states_are_known_to_the_backbone(case: Case) -> None:
    names = state_names(case.tuner, case.config, case.backbone)
    assert names and set(names) <= {*case.backbone.states(), *case.backbone.made_states()}
    batch = case.batch()
    assert all(v.shape[1] == case.backbone.full_width(k) for k, v in batch.states.items())


CHECKS: list[Callable[[Case], None]] = [
    shapes,
    gradients_reach_the_tuner_and_never_the_frozen_weights,
    saved_state_gives_the_same_predictions,
    weights_follow_from_the_seed,
    smaller_formats_change_little,
    states_as_stored_give_the_same_step,
    single_rows_and_zero_states_stay_finite,
    half_precision_training_stays_finite,
    a_sample_does_not_see_the_others,
    states_are_known_to_the_backbone,
]


def every_state_has_its_width(case: Case) -> None:
    backbone, names = case.backbone, [*case.backbone.states(), *case.backbone.made_states()]
    batch = case.inputs.batch()
    found = backbone.run(case.loaded, batch, names)
    assert len(set(names)) == len(names) and found.keys() == set(names)
    for name, rows in found.items():
        expected = (len(batch.layout(stream_of(name)).sample), backbone.state_width(name))
        assert rows.shape == expected and torch.isfinite(rows).all(), name
    assert set(backbone.full_states()) <= set(names)


def only_wanted_states_are_collected(case: Case) -> None:
    batch = case.inputs.batch()
    every = case.backbone.run(case.loaded, batch, case.backbone.states())
    for name in every:
        found = case.backbone.run(case.loaded, batch, [name])
        assert list(found) == [name]
        torch.testing.assert_close(found[name], every[name], rtol=1e-4, atol=1e-5)


def a_sample_runs_alone_as_beside_others(case: Case) -> None:
    names = case.backbone.states()
    together = case.backbone.run(case.loaded, case.inputs.batch(), names)
    at = dict.fromkeys(names, 0)
    for i in range(len(case.inputs)):
        alone = case.backbone.run(case.loaded, case.inputs.take(np.array([i])).batch(), names)
        for name, rows in alone.items():
            torch.testing.assert_close(rows, together[name][at[name] : at[name] + len(rows)], rtol=1e-3, atol=1e-4)
            at[name] += len(rows)


def inputs_are_known_by_what_they_are(case: Case) -> None:
    backbone, inputs = case.backbone, case.inputs
    assert len(set(inputs.keys())) == len(inputs) and inputs.columns.keys() == set(backbone.columns)
    assert inputs.take(np.array([3, 0])).keys() == [inputs.keys()[3], inputs.keys()[0]]
    assert backbone.refuse_columns(inputs.lengths, inputs.columns) is None


def the_tail_goes_on_where_states_end(case: Case) -> None:
    """Embeddings have the backbone's width; a live last block gives what the backbone's own gives."""
    backbone, batch = case.backbone, case.inputs.batch()
    live = isinstance(backbone, LiveLast)
    tail = backbone.tail(backbone.tail_weights(case.loaded), "sdpa").eval()
    assert not any(p.requires_grad for p in tail.parameters())
    batch.states = backbone.run(case.loaded, batch, backbone.states())
    if backbone.shape == "sequence":
        for stream in backbone.streams:
            rows = len(batch.layout(stream).sample)
            assert tail.embed(batch, stream).shape == (rows, backbone.width)
            assert tail.final_norm(batch.states[f"{stream}.0"], stream).shape == (rows, backbone.width)
    stream, last = backbone.streams[-1], backbone.depth(backbone.streams[-1]) - 1
    if live and last:
        hidden = {s: batch.states[f"{s}.{backbone.depth(s) - 1}"] for s in backbone.streams[:-1]}
        hidden = {s: tail.final_norm(rows, s) for s, rows in hidden.items()}
        found = tail({**hidden, stream: batch.states[f"{stream}.{last - 1}"]}, batch)
        torch.testing.assert_close(found, batch.states[f"{stream}.{last}"], rtol=1e-4, atol=1e-4)


def every_tuner_works_or_says_why_not(case: Case) -> None:
    works = tuner_names(type(case.backbone))
    assert "probe" in works
    for name in tuner_names():
        try:
            tuner_class(name, case.backbone)
        except UserError as error:
            assert name not in works and repr(name) in str(error) and case.backbone.name in str(error)
        else:
            assert name in works


BACKBONE_CHECKS: list[Callable[[Case], None]] = [
    every_state_has_its_width,
    only_wanted_states_are_collected,
    a_sample_runs_alone_as_beside_others,
    inputs_are_known_by_what_they_are,
    the_tail_goes_on_where_states_end,
    every_tuner_works_or_says_why_not,
]


def conform(tuner: str, model: str, pictures: str | Path = "", **options: Any) -> None:
    """Put the registered `tuner` with `options` through all checks on `model`: a name, or the folder of a checkpoint,
    the smaller the faster. `pictures`: a folder of images as a task, for backbones that see. Raises AssertionError
    naming the check."""
    _put_through(Case(checkpoint_for(model), tuner, Path(pictures), options), CHECKS, f"{tuner} on {model}")


def conform_backbone(model: str, pictures: str | Path = "", tuners: Sequence[str] | None = None) -> None:
    """Put the backbone of the checkpoint `model` through its own checks, then each of `tuners`, all that work on it by
    default, through `conform`'s. Raises AssertionError naming the check."""
    point = checkpoint_for(model)
    _put_through(Case(point, "probe", Path(pictures)), BACKBONE_CHECKS, model)
    for tuner in tuner_names(type(point.backbone)) if tuners is None else tuners:
        _put_through(Case(point, tuner, Path(pictures)), CHECKS, f"{tuner} on {model}")


def _put_through(case: Case, checks: Sequence[Callable[[Case], None]], what: str) -> None:
    for check in checks:
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"{what}: {check.__name__}: {error}") from error
