"""Side blocks: the general ones see what a position sees in the backbone, and whoever has own ones gets those."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.extract.backbones import Backbone, Batch
from pipeline.extract.backbones.bert import Bert
from pipeline.extract.past import Past
from pipeline.extract.pretrained import Checkpoint
from pipeline.store import UserError
from pipeline.train.sideblocks import SideStack, TransformerStack, prunable, pruned, side_stack
from pipeline.train.sideblocks.bert import BertSideStack
from pipeline.train.tuners import fitting_tuner, tuner_config

LENGTHS = np.array([4, 2])


def batch_of(parent: list[int] | None = None) -> Batch:
    columns = {} if parent is None else {"decoder.parent": torch.tensor(parent)}
    return Batch({}, columns, {"decoder": LENGTHS})


def seen_by(stack: SideStack, batch: Batch) -> np.ndarray:
    """(rows, rows) bool: whether the output at a row changes with the input at another."""
    layout, rows = batch.layout("decoder"), torch.randn(6, stack.width)
    context = stack.eval().context(batch, "decoder", None)

    def out(x: torch.Tensor) -> torch.Tensor:
        grid = layout.pad(x)
        for index in range(2):
            grid = stack.block(index, grid, context)
        return stack.final(layout.unpad(grid))

    plain, seen = out(rows), np.zeros((6, 6), bool)
    for i in range(6):
        moved = rows.clone()
        moved[i] += torch.randn(stack.width)
        seen[:, i] = ((out(moved) - plain).abs().amax(1) > 1e-6).numpy()
    return seen


@pytest.mark.parametrize("how", ["whole", "causal", "tree"])
@torch.no_grad()
def test_a_position_sees_what_it_sees_in_the_backbone(how):
    torch.manual_seed(0)
    # A root with two branches, 1 → 3 and 2; then a chain.
    parent = [-1, 0, 0, 1, -1, 0]
    path = {0: [0], 1: [0, 1], 2: [0, 2], 3: [0, 1, 3], 4: [4], 5: [4, 5]}
    sample = [0, 0, 0, 0, 1, 1]
    stack = TransformerStack(16, 4, 2, causal=how != "whole")
    found = seen_by(stack, batch_of(parent if how == "tree" else None))
    for i in range(6):
        together = [j for j in range(6) if sample[j] == sample[i]]
        expected = {"whole": together, "causal": [j for j in together if j <= i], "tree": path[i]}[how]
        assert found[i].nonzero()[0].tolist() == expected


def test_general_blocks_refuse_positions_without_those_before_them():
    batch = batch_of()
    batch.past = Past()
    with pytest.raises(UserError, match="token at a time"):
        TransformerStack(16, 4, 2, causal=True).context(batch, "decoder", None)


class Kin(Bert):
    """A backbone derived from one that has blocks of its own."""


class Stranger(Backbone):
    name = "stranger"
    streams = ("decoder",)
    causal = ("decoder",)
    width = 48

    def depth(self, stream: str) -> int:
        return 3

    prepare = load = run = None  # type: ignore[assignment]


def test_derived_backbones_have_the_blocks_of_their_kind_and_strangers_general_ones(checkpoints):
    bert = Checkpoint(checkpoints["bert"], "bert").backbone
    for backbone in (bert, Kin(bert.config)):
        assert isinstance(side_stack(backbone, "encoder", [0, 1], 4), BertSideStack) and prunable(backbone)
    stranger = Stranger(None)
    stack = side_stack(stranger, "decoder", [0, 2], 4)
    assert isinstance(stack, TransformerStack) and stack.causal and (stack.width, len(stack.blocks)) == (12, 2)
    assert not prunable(stranger)
    with pytest.raises(UserError, match="stranger backbones have no pruning yet"):
        pruned(stranger, None, {}, 4, False)
    with pytest.raises(UserError, match="stranger backbones have no pruning yet; use random"):
        fitting_tuner("lst", tuner_config("lst", {"init": "magnitude", "reduction": 4}), stranger)


def test_a_backbone_of_others_may_bring_its_own():
    class Own(Stranger):
        pass

    class OwnStack(TransformerStack):
        pass

    side_stack.register(Own, lambda backbone, stream, layers, reduction: OwnStack(backbone.width // reduction, 1, 2))
    assert type(side_stack(Own(None), "decoder", [0], 4)) is OwnStack
    assert type(side_stack(Stranger(None), "decoder", [0], 4)) is TransformerStack


def test_a_projected_backbone_is_a_copy_that_leaves_the_other_as_it_is(checkpoints):
    from pipeline.extract.projection import orthogonal

    bert = Checkpoint(checkpoints["bert"], "bert").backbone
    small = bert.projected(orthogonal({"encoder.0": bert.width}, 8, 0))
    assert (small.state_width("encoder.0"), bert.state_width("encoder.0")) == (8, bert.width)
    assert small.state_width("encoder.1") == bert.width and small.projected(None).state_width("encoder.0") == bert.width
    with pytest.raises(AttributeError):
        bert.projection = small.projection
