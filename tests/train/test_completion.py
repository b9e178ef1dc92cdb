"""The completion objective and what writes text: losses over targets alone, logits a few rows at a time, caches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.extract.backbones import Batch, backbone_for
from pipeline.extract.backbones.live import LiveBackbone
from pipeline.extract.past import Past
from pipeline.store.errors import UserError
from pipeline.train.continuation import Choice, continued
from pipeline.train.fit.finite import NotFinite
from pipeline.train.model import Model, state_names, tail_for
from pipeline.train.objectives import Answers, objective_class
from pipeline.train.objectives import linear_entropy as entropy
from pipeline.train.objectives.completion import Completion
from pipeline.train.tuners import tuner_class, tuner_config, tuner_names
from tests import decoders

TUNERS = [name for name in tuner_names() if tuner_class(name).continues_text]
KINDS = [pytest.param(kind, marks=() if kind in decoders.USUAL else pytest.mark.matrix) for kind in decoders.TYPES]
LENGTHS = [6, 3, 9, 4]


def objective() -> Completion:
    cls = objective_class("completion")
    return cls(cls.config_class(), Answers())


def made(kind: str, tuner: str) -> tuple[Model, LiveBackbone]:
    """A model of `tuner` with weights large enough to show, on a small decoder of `kind`."""
    live = decoders.model(kind)
    backbone = backbone_for(live.config)
    config = tuner_config(tuner, {"reduction": 4} if "reduction" in dir(tuner_class(tuner).config_class) else {})
    tail = tail_for(tuner, config, backbone, backbone.attentions[0], backbone.tail_weights(live))
    model = Model.build(tuner, config, backbone, tail, objective(), seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0
    return model, LiveBackbone(backbone, lambda: live, torch.device("cpu"))


def a_batch(spans: list[list[list[int]]]) -> Batch:
    """Samples of `LENGTHS` ids with `spans` to learn."""
    ids = torch.randint(3, 64, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2))
    metas = [{"tokens": n, "learn": s} for n, s in zip(LENGTHS, spans, strict=True)]
    batch = Batch({}, {"decoder.ids": ids}, {"decoder": np.array(LENGTHS)}, metas=metas)
    batch.targets = objective().collate([objective().encode(None, meta) for meta in metas], batch)
    return batch


SPANS = [[[1, 6]], [[2, 3]], [[3, 4], [6, 9]], [[1, 2]]]


@pytest.mark.parametrize("chunk", [50, 1 << 20])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_few_rows_at_a_time_give_the_loss_and_gradients_of_all_at_once(monkeypatch, chunk, frozen):
    monkeypatch.setattr(entropy, "CHUNK_VALUES", chunk)  # 50: a row, or a few
    torch.manual_seed(0)
    table, rows = torch.randn(17, 5, requires_grad=not frozen), torch.randn(11, 5, requires_grad=True)
    tokens, most = torch.randint(17, (11,)), []

    def logits(part):
        most.append(len(part))
        return 3 * torch.tanh(part @ table.t())

    whole = F.cross_entropy(logits(rows), tokens, reduction="sum")
    wanted = torch.autograd.grad(2 * whole, [rows] if frozen else [rows, table])
    most.clear()
    total = entropy.summed_entropy(rows, tokens, logits, 17, frozen)
    found = torch.autograd.grad(2 * total, [rows] if frozen else [rows, table])
    torch.testing.assert_close(total, whole)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert max(most) == (2 if chunk == 50 else 11)
    nats, hits = entropy.entropy_and_hits(rows, tokens, logits, 17)
    torch.testing.assert_close(nats.sum(), whole.detach())
    assert hits.tolist() == (logits(rows).argmax(-1) == tokens).tolist()


def test_only_rows_before_targets_count_and_batches_weigh_by_targets():
    model, _ = made("llama", "probe")
    batch = a_batch(SPANS)
    rows = torch.randn(sum(LENGTHS), 32, requires_grad=True)
    (loss,) = model.head.losses({"decoder": rows}, batch).values()
    begin, ids, terms = 0, batch.columns["decoder.ids"], []
    before = []
    for n, spans in zip(LENGTHS, SPANS, strict=True):
        for place in [p for a, b in spans for p in range(a, b)]:
            before.append(begin + place - 1)
            logits = model.tuner.tail.logits(rows[begin + place - 1])
            terms.append(-logits.log_softmax(-1)[ids[begin + place]])
        begin += n
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    loss.backward()
    assert (rows.grad.abs().sum(1) > 0).nonzero()[:, 0].tolist() == before
    assert model.weight(batch) == len(terms) == 11
    scorer = model.objective.scorer()
    for part in (batch, batch):
        scorer.update(model.head.measure({"decoder": rows}, part), part)
    figures = scorer.compute()
    assert figures["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert scorer.value(figures) == -figures["loss"]  # a smaller loss is the better epoch
    batch.targets, told = None, model.objective.entries(model.head.predict({"decoder": rows}, batch))
    assert [entry["tokens"] for entry in told] == [5, 1, 4, 1]  # from the metas alone
    with pytest.raises(NotFinite):
        model.head.predict({"decoder": rows.detach() * torch.nan}, batch)


def test_an_all_layer_probe_under_a_frozen_head_selects_channels_of_its_map():
    live = decoders.model("llama")
    backbone = backbone_for(live.config)
    config = tuner_config("head2toe", {"features": 0.25, "select_after": 3, "lasso": 0.01})
    tail = tail_for("head2toe", config, backbone, "sdpa", backbone.tail_weights(live))
    model = Model.build("head2toe", config, backbone, tail, objective(), seed=0).train()
    batch = a_batch(SPANS)
    with torch.no_grad():
        batch.states = backbone.run(live, batch, backbone.states())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    first = float(model.loss(batch).detach())
    for step in range(1, 7):
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
        model.stepped()
        assert int(model.tuner.mask.sum()) == (128 if step < 3 else 32)
    assert float(model.loss(batch).detach()) < first and model.penalty() is None


def test_metas_that_are_not_of_the_samples_are_refused():
    model, _ = made("llama", "probe")
    batch = a_batch(SPANS)
    batch.targets = {"learn": torch.ones(5, dtype=torch.bool)}
    with pytest.raises(UserError, match="tells of 5 tokens where 22"):
        model.head.losses({"decoder": torch.zeros(22, 32)}, batch)


@pytest.mark.parametrize(
    ("tuner", "options", "count"),
    [("probe", {}, 32 * 32), ("probe", {"mlp": 8}, 2 * 32 * 8 + 32 + 8), ("head2toe", {}, 4 * 32 * 32)],
)
@torch.no_grad()
def test_probes_start_as_the_frozen_model(tuner, options, count):
    live = decoders.model("llama")
    backbone = backbone_for(live.config)
    config = tuner_config(tuner, options)
    tail = tail_for(tuner, config, backbone, "sdpa", backbone.tail_weights(live))
    model = Model.build(tuner, config, backbone, tail, objective(), seed=0).eval()
    assert model.trainable_parameters() == count
    batch = a_batch(SPANS)
    batch.states = backbone.run(live, batch, state_names(tuner, config, backbone))
    out = model.tuner.tail.logits(model(batch)["decoder"])
    first = live(input_ids=batch.columns["decoder.ids"][None, : LENGTHS[0]]).logits[0]
    torch.testing.assert_close(out[: LENGTHS[0]], first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_no_row_sees_a_later_position_and_caches_change_nothing(kind, tuner):
    model, live = made(kind, tuner)
    states, lengths = state_names(tuner, model.tuner.config, live.backbone), np.array([10, 10])
    ids = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(3))

    def rows(part: torch.Tensor, past: Past | None = None) -> torch.Tensor:
        sizes = np.full(2, part.shape[1])
        batch = live.filled(Batch({}, {"decoder.ids": part.flatten()}, {"decoder": sizes}, past=past), states)
        return model(batch)["decoder"].view(2, part.shape[1], -1)

    whole = rows(ids)
    assert len(lengths) == 2 and torch.isfinite(whole).all()
    other = ids.clone()
    other[:, 7:] = 3
    torch.testing.assert_close(rows(other)[:, :7], whole[:, :7], rtol=1e-3, atol=1e-4)
    past, pieces = Past(), []
    for first, end in ((0, 4), (4, 5), (5, 6), (6, 10)):
        pieces.append(rows(ids[:, first:end], past))
        past.length = end
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-3, atol=1e-4)


def recomputed(model: Model, live: LiveBackbone, prompt: list[int], most: int, ends: set[int]) -> list[int]:
    """Greedy tokens with everything run anew for each."""
    states, ids = state_names(model.tuner.name, model.tuner.config, live.backbone), list(prompt)
    while len(ids) < len(prompt) + most:
        batch = Batch({}, {"decoder.ids": torch.tensor(ids)}, {"decoder": np.array([len(ids)])})
        with torch.inference_mode():
            row = model(live.filled(batch, states))["decoder"][-1:]
            token = int(model.tuner.tail.logits(row).argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_full_recomputation(kind, tuner):
    """Prompts of all lengths in one batch, windows of 4 positions, an end token that some reach."""
    model, live = made(kind, tuner)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [5, 6, 7]]
    plain = [recomputed(model, live, p, 12, set()) for p in prompts]
    ends = {plain[0][3]}
    wanted = [recomputed(model, live, p, 12, ends) for p in prompts]
    written = continued(model, live, prompts, most=12, ends=ends, choose=Choice(), batch_size=3)
    assert [w.ids for w in written] == wanted
    assert [w.ended for w in written] == ["end" if len(ids) < 12 else "length" for ids in wanted]


def test_drawing_follows_the_seed_and_keeps_to_the_likely():
    logits = torch.tensor([[2.0, 1.0, 0.0, -9.0]]).repeat(400, 1)

    def draw(seed: int = 0, **how: float) -> list[int]:
        choice = Choice(1.0, **how)  # type: ignore[arg-type]
        return choice(logits, torch.Generator().manual_seed(seed)).tolist()

    assert draw() == draw() != draw(1)
    assert set(draw(top_k=2)) == {0, 1} and set(draw(top_p=0.7)) == {0, 1} and set(draw(top_p=0.5)) == {0}
    share = sum(token == 0 for token in draw()) / 400
    assert abs(share - float(logits[0].softmax(0)[0])) < 0.08
    for wrong in ({"temperature": -1.0}, {"top_k": 2}, {"temperature": 1.0, "top_p": 0.0}):
        with pytest.raises(UserError):
            Choice(**wrong)


def test_a_prompt_must_leave_room():
    model, live = made("llama", "probe")
    with pytest.raises(UserError, match="prompt 2 has 160 tokens; the model takes 1 to 159"):
        continued(model, live, [[3], [3] * 160], most=1, ends=(), choose=Choice())
    (written,) = continued(model, live, [[3] * 158], most=9, ends=(), choose=Choice())
    assert len(written.ids) == 2 and written.ended == "length"


def test_virtual_tokens_in_the_live_layer_are_no_way_to_write():
    live = decoders.model("llama")
    backbone = backbone_for(live.config)
    config = tuner_config("sherl", {"reduction": 4, "tail": "prompt"})
    tail = tail_for("sherl", config, backbone, "sdpa", backbone.tail_weights(live))
    model = Model.build("sherl", config, backbone, tail, objective(), seed=0)
    with pytest.raises(UserError, match="virtual tokens"):
        continued(
            model, LiveBackbone(backbone, lambda: live, torch.device("cpu")), [[3]], most=1, ends=(), choose=Choice()
        )


def test_tuners_that_mix_positions_cannot_go_on_with_texts():
    backbone = backbone_for(decoders.config("llama"))
    config = tuner_config("unipt", {})
    tail = tail_for("unipt", config, backbone, "sdpa")
    with pytest.raises(UserError, match="needs rows for a text head"):
        Model(tuner_class("unipt", backbone)(config, backbone, tail, objective().wants), objective())
    assert {"sherl", "lst", "probe"} <= set(TUNERS)
