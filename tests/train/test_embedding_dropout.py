"""What a side network reads of the embedding is dropped out once while training, as in the released code."""

from __future__ import annotations

import pytest
import torch

from pipeline.extract.pretrained import checkpoint_for
from pipeline.lookup.objective import class_objective
from pipeline.train.model import Model, state_names, tail_for
from pipeline.train.tuners import tuner_class, tuner_config
from tests.extract.test_backbones import inputs_of

P = 0.1


@pytest.mark.parametrize("backbone", ["t5", "bert", "roberta"])
@pytest.mark.parametrize("tuner", ["lst", "sherl", "unipt"])
def test_the_embedding_is_dropped_once(checkpoints, backbone, tuner):
    checkpoint = checkpoint_for(str(checkpoints[backbone]))
    made, config = checkpoint.backbone, tuner_config(tuner, {"reduction": 4})
    module = made.load(checkpoint.folder, torch.float32, "sdpa", "cpu")
    tail = tail_for(tuner, config, made, "sdpa", made.tail_weights(module))
    model = Model.build(
        tuner, config, made, tail, class_objective(made, tuner_class(tuner, made), ((5, 1), (6, 1))), 0
    ).train()
    batch = inputs_of(checkpoint, 24).batch()
    batch.states = made.run(module, batch, state_names(tuner, config, made))
    zeros = []
    first = {"lst": "ladders.encoder.first", "sherl": "mtsa.encoder.down.0", "unipt": "down.0.0"}[tuner]
    model.tuner.get_submodule(first).register_forward_pre_hook(lambda _, args: zeros.append((args[0] == 0).float()))
    model(batch)
    (dropped,) = zeros
    assert dropped.numel() > 4000
    assert dropped.mean().item() == pytest.approx(P, abs=5 * (P * (1 - P) / dropped.numel()) ** 0.5)
