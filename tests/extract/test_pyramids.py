"""Feature pyramids of convolutional networks: states are the network's own, each image is padded alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.extract.backbones import TextOptions, backbone_for
from pipeline.extract.backbones.grids import sizes
from pipeline.extract.pretrained import Checkpoint
from pipeline.store.errors import UserError
from pipeline.testing import BACKBONE_CHECKS, Case
from pipeline.train.tuners import fitting_tuner, tuner_config

LEVELS = {"mobilenet": (2, 3, 5, 7), "convnext": (1, 2, 3, 4), "resnet": (1, 2, 3, 4), "swin": (1, 2, 3, 4)}


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """Images whose sides are no multiples of any stride."""
    folder, rng = tmp_path_factory.mktemp("unequal"), np.random.default_rng(0)
    for i, size in enumerate(((64, 64), (50, 75), (33, 97), (50, 75))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def prepared(checkpoint, folder, numbers, **options):
    names = [(f"{i}.png",) for i in numbers]
    return checkpoint.backbone.prepare(checkpoint.tokenizer, names, TextOptions(root=str(folder), **options))


@pytest.mark.parametrize("name", ["mobilenet", "convnext"])
def test_states_are_those_of_timms_own_pyramid(checkpoints, unequal, name):
    checkpoint = Checkpoint(checkpoints[name], name)
    backbone, model = checkpoint.backbone, checkpoint.backbone.load(checkpoint.folder, torch.float32, "sdpa", "cpu")
    inputs = prepared(checkpoint, unequal, [1], image_size="own")
    last = [f"{s}.{backbone.depth(s) - 1}" for s in backbone.levels]
    assert backbone.levels == tuple(f"stage{i}" for i in LEVELS[name])
    with torch.no_grad():
        states = backbone.run(model, inputs.batch(), backbone.states())
        pixels = inputs.pictures[0].pixels()[None]
        expected = model.forward_intermediates(pixels, intermediates_only=True)[-4:]
        if name == "mobilenet":  # what its classifier reads is a stream too
            expected.append(model.forward_features(pixels))
            last.append("stage8.0")
    for state, features in zip(last, expected, strict=True):
        torch.testing.assert_close(states[state], features.flatten(2).mT.flatten(0, 1), rtol=1e-4, atol=1e-5)
    assert {k: len(v) for k, v in states.items()} == {k: inputs.lengths[k.split(".")[0]][0] for k in backbone.states()}


@pytest.mark.parametrize("name", LEVELS)
def test_each_picture_is_padded_alone_to_the_coarsest_stride(checkpoints, unequal, name):
    checkpoint = Checkpoint(checkpoints[name], name)
    backbone, model = checkpoint.backbone, checkpoint.backbone.load(checkpoint.folder, torch.float32, "sdpa", "cpu")
    inputs = prepared(checkpoint, unequal, range(4), image_size="own", dense=True)
    assert [p.extent for p in inputs.pictures] == [(64, 64), (64, 96), (64, 128), (64, 96)]
    batch, states = inputs.batch(), [f"{s}.0" for s in backbone.levels]
    together = backbone.run(model, batch, states)
    for i in range(4):
        one = inputs.take(np.array([i]))
        alone = backbone.run(model, one.batch(), states)
        for state in states:
            stream = state.split(".")[0]
            first = int(inputs.lengths[stream][:i].sum())
            rows = together[state][first : first + len(alone[state])]
            torch.testing.assert_close(rows, alone[state], rtol=1e-3, atol=1e-4)
            shape = sizes(one.batch(), backbone.streams, stream)[0]
            assert tuple(shape) == tuple(n // backbone.stride(stream) for n in one.pictures[0].extent)
    assert [backbone.stride(s) for s in backbone.levels] == [4, 8, 16, 32]


@pytest.fixture(scope="module")
def cases(checkpoints, pictures):
    return {name: Case(Checkpoint(checkpoints[name], name), "probe", pictures) for name in ("mobilenet", "convnext")}


@pytest.mark.parametrize("check", BACKBONE_CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", ["mobilenet", "convnext"])
def test_they_keep_the_contract_of_backbones(cases, name, check):
    with torch.no_grad():
        check(cases[name])


def test_a_stage_of_one_block_is_refused_at_the_door(checkpoints):
    one, more = (Checkpoint(checkpoints[name], name).backbone for name in ("mobilenet", "resnet"))
    config = tuner_config("sherl", {})
    with pytest.raises(UserError, match="of one width; stage8 of efficientnet backbones has a single one"):
        fitting_tuner("sherl", config, one)
    assert fitting_tuner("sherl", config, more)


def test_overlapping_stems_and_odd_sides_have_the_grid_they_give(checkpoints, unequal):
    config = Checkpoint(checkpoints["convnext"], "convnext").config
    same = {"pad_type": "same"}
    for architecture, more in (("convnext_atto_ols", {}), ("convnext_atto", {}), ("mobilenetv2_035", same)):
        config.architecture, config.model_args = architecture, more
        backbone = backbone_for(config)
        with torch.device("meta"):
            model = backbone.make().eval()
            for side in (64, 75, 97, 110):
                grid = backbone.stem(model, torch.zeros(1, 3, side, side + 9))
                for number, blocks in enumerate(backbone.stages(model)):
                    for block in (*backbone.before(model, number), *blocks):
                        grid = block(grid)
                    assert tuple(grid.shape[2:]) == backbone.grid(backbone.streams[number], side, side + 9)
                    assert grid.shape[1] == backbone.channels(number)
