"""Readouts: teacher-forced loss and greedy choice among targets, against the plain way of doing both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.extract.backbones.text import decision_trie, gold_chain
from pipeline.extract.inputs import Inputs
from pipeline.train.features import Feature
from pipeline.train.objectives.label_text import TextHead
from pipeline.train.objectives.pooled import PooledHead
from pipeline.train.objectives.regression import NumberHead

VOCABULARY = 12


class ToyTail(torch.nn.Module):
    """A head that reads logits straight off the rows."""

    def logits(self, rows, tokens=None):
        return rows if tokens is None else rows[:, tokens]


def batch_of(tries, labels):
    lengths = np.asarray([len(t[0]) for t in tries])
    columns = {
        "decoder.ids": np.concatenate([t[0] for t in tries]).astype(np.int32),
        "decoder.parent": np.concatenate([t[1] for t in tries]).astype(np.int32),
    }
    batch = Inputs({"decoder": lengths}, columns).batch()
    batch.targets = None if labels is None else {"label": labels}
    return batch


TARGETS = [[3, 4, 1], [5, 1], [3, 6, 7, 1], [3, 6, 8, 1], [9, 9, 1]]


def test_loss_is_cross_entropy_on_the_own_target():
    head = TextHead("decoder", ToyTail(), TARGETS)
    labels = torch.tensor([2, 1, 0, 4])
    batch = batch_of([gold_chain(TARGETS[i], 0) for i in labels], labels)
    rows = torch.randn(int(batch.lengths["decoder"].sum()), VOCABULARY)
    expected = F.cross_entropy(rows, torch.tensor([t for i in labels for t in TARGETS[i]]))
    torch.testing.assert_close(head.losses({"decoder": rows}, batch)["token"], expected)


def test_losses_of_parts_add_up_by_their_weights():
    """Targets of 2 to 4 tokens: what one batch gives, two that make it up give too."""
    head, labels = TextHead("decoder", ToyTail(), TARGETS), torch.tensor([2, 1, 0, 4])
    torch.manual_seed(0)
    rows = torch.randn(sum(len(TARGETS[i]) for i in labels), VOCABULARY)

    def part(first, end):
        batch = batch_of([gold_chain(TARGETS[i], 0) for i in labels[first:end]], labels[first:end])
        at = sum(len(TARGETS[i]) for i in labels[:first])
        own = rows[at : at + int(batch.lengths["decoder"].sum())]
        return head.losses({"decoder": own}, batch)["token"], head.weight(batch)

    (whole, all_of_it), (one, a), (two, b) = part(0, 4), part(0, 1), part(1, 4)
    assert (a, b, all_of_it) == (4, 8, 12)
    torch.testing.assert_close((a * one + b * two) / (a + b), whole)


def greedy(logits_of, targets):
    """Plain greedy decoding restricted to `targets`: the index it ends in."""
    alive, prefix = list(range(len(targets))), ()
    while len(alive) > 1:
        options = {targets[i][len(prefix)] for i in alive}
        best = max(options, key=lambda t: float(logits_of(prefix)[t]))
        prefix = (*prefix, best)
        alive = [i for i in alive if tuple(targets[i][: len(prefix)]) == prefix]
    return alive[0]


@pytest.mark.parametrize(
    "targets",
    [TARGETS, [[3, 1], [4, 1]], [[3, 4, 1], [3, 5, 1]], [[i, j, 1] for i in range(2, 6) for j in range(2, 9)]],
)
def test_choice_is_greedy_decoding_among_the_targets(targets):
    head = TextHead("decoder", ToyTail(), targets)
    ids, parents = decision_trie(targets, 0)
    prefixes: list[tuple[int, ...]] = []
    for token, parent in zip(ids, parents, strict=True):
        prefixes.append(() if parent < 0 else (*prefixes[parent], token))
    torch.manual_seed(0)
    n = 40
    batch = batch_of([(ids, parents)] * n, None)
    rows = torch.randn(n * len(ids), VOCABULARY)
    expected = []
    for s in range(n):
        mine = rows[s * len(ids) : (s + 1) * len(ids)]
        expected.append(greedy(lambda p, mine=mine: mine[prefixes.index(p)], targets))
    chosen, chance = head.choose(rows, batch)
    assert chosen.tolist() == expected and len(set(expected)) > 1
    for s in range(n):
        mine, found, prefix, alive = rows[s * len(ids) : (s + 1) * len(ids)], 1.0, (), list(targets)
        while len(alive) > 1:  # the product over the places where targets part
            options = sorted({t[len(prefix)] for t in alive})
            if len(options) > 1:
                token = targets[expected[s]][len(prefix)]
                share = mine[prefixes.index(prefix)][options].softmax(0)
                found *= float(share[options.index(token)])
            prefix = (*prefix, targets[expected[s]][len(prefix)])
            alive = [t for t in alive if tuple(t[: len(prefix)]) == prefix]
        assert float(chance[s]) == pytest.approx(found, rel=1e-5)


def test_regression_targets_round_half_to_even_as_the_inputs_were_made():
    from pipeline.extract.tasks.base import TaskSpec

    values = tuple(round(0.1 * i, 1) for i in range(51))
    spec = TaskSpec("stsb", "number", (), ("pearson",), ("a",), "{0}", tuple(f"{v:.1f}" for v in values), values)
    head = TextHead("decoder", ToyTail(), [[i + 2, 1] for i in range(51)], values)
    labels = torch.tensor([4.25, 2.35, 0.05, 0.15, 5.0, 0.0, 3.333, 2.45], dtype=torch.float64)
    assert head.target_of(labels).tolist() == [spec.target_index(v) for v in labels.tolist()]


def test_pooling_is_the_mean_over_a_samples_own_rows():
    batch = Inputs({"encoder": np.array([2, 1, 3])}, {"encoder.ids": np.zeros(6, np.int32)}).batch()
    rows = torch.arange(12.0).view(6, 2)
    layout = batch.layout("encoder")
    torch.testing.assert_close(layout.mean(rows), torch.stack([rows[:2].mean(0), rows[2], rows[3:].mean(0)]))
    first = PooledHead({"a": Feature(2, "encoder")}, 1, "first")
    torch.testing.assert_close(first.outputs({"a": rows}, batch), first.linear(rows[[0, 2, 3]]))


def test_pooled_regression_is_squared_error():
    head = NumberHead({"a": Feature(2, "encoder")}, 1, "mean")
    batch = Inputs({"encoder": np.array([1, 1])}, {"encoder.ids": np.zeros(2, np.int32)}).batch()
    told = torch.tensor([1.0, 2.0], dtype=torch.float64)
    batch.targets = {"label": told}
    rows = torch.randn(2, 2)
    expected = ((head.linear(rows)[:, 0] - told.float()) ** 2).mean()
    torch.testing.assert_close(head.losses({"a": rows}, batch)["number"], expected)
