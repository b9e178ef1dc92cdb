"""SHERL and UniPT on staged backbones, set up as a golden case says."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ResNetConfig

from pipeline.extract.backbones import Batch
from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.pyramid import pooled_maps
from pipeline.extract.backbones.registry import backbone_for
from pipeline.train.features import Want
from pipeline.train.objectives.retrieval import in_cells
from pipeline.train.tuners import tuner_config
from pipeline.train.tuners.vse import SherlVseConv, UniptVseConv
from tests.golden import Case
from tests.golden.compare import Place, Setup
from tests.golden.texts import Pairs, affine


def staged(case: Case) -> tuple[Backbone, Batch]:
    """A ResNet of the case's widths whose last stage has three blocks, and the case's maps as packed rows."""
    c = case.config
    backbone = backbone_for(ResNetConfig(embedding_size=c["widths"][0], hidden_sizes=c["widths"], depths=[1, 1, 1, 3]))
    states, lengths = {}, {}
    grids = np.asarray([[n, n] for n in c["sizes"]], np.int32)
    for stream in backbone.streams:
        maps = case.tensors[f"input/{stream}"]
        # The released code names a stage's map alike, be it that before the live block or the last.
        last = range(backbone.depth(stream))[-2:]
        rows = maps.flatten(2).transpose(1, 2).reshape(-1, maps.shape[1])
        states |= {f"{stream}.{i}": rows for i in last}
        lengths[stream] = np.full(c["batch"], maps.shape[2] * maps.shape[3])
    lengths["grid"] = np.full(c["batch"], grids.size)
    columns = {"grid.sizes": torch.from_numpy(np.tile(grids.reshape(-1), c["batch"])).long()}
    return backbone, Batch(states, columns, lengths)


def conv_norm(ours: str, official: str) -> tuple[dict[str, Place], dict[str, Place]]:
    """A 1 × 1 convolution and batch norm: their parameters, and the running statistics."""
    places = {
        f"{official}.0.weight": Place(f"{ours}.linear.weight", lambda t: t[..., None, None]),
        f"{official}.0.bias": Place(f"{ours}.linear.bias"),
        **affine(f"{ours}.norm", f"{official}.1"),
    }
    return places, {f"{official}.1.{n}": Place(f"{ours}.norm.{n}") for n in ("running_mean", "running_var")}


def as_maps(rows: Tensor, like: Tensor) -> Tensor:
    """Packed rows as maps of the shape of `like` (B, C, H, W)."""
    batch, channels, height, width = like.shape
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


def sherl_resnet(case: Case) -> Setup:
    c = case.config
    backbone, batch = staged(case)
    weights: dict[str, Tensor] = {}
    for name, tensor in case.under("backbone").items():
        kind, _, rest = name.removeprefix("layer4.2.").partition(".")
        part = "convolution" if kind.startswith("conv") else "normalization"
        weights[f"block.layer.{int(kind[-1]) - 1}.{part}.{rest}"] = tensor
    counters = {f"block.layer.{i}.normalization.num_batches_tracked": torch.tensor(0) for i in range(3)}
    tail = backbone.tail({**weights, **counters}, "sdpa")
    tuner = SherlVseConv(tuner_config("sherl-vse", {}), backbone, tail, Want(joint=2 * c["hidden"]))
    for i, (size, width) in enumerate(zip(c["sizes"][:-1], c["widths"][:-1], strict=True), 1):
        rows = batch.states[f"stage{i}.{backbone.depth(f'stage{i}') - 1}"].view(c["batch"], -1, width)
        batch.states[f"{tuner.stream}.pool{i}"] = pooled_maps(rows, (size,) * 2, (c["sizes"][-1],) * 2).flatten(0, 1)
    side = "side_module"
    places, buffers = conv_norm("up", f"{side}.conv_out")
    for i in range(len(c["widths"])):
        more, stats = conv_norm(f"down.{i}", f"{side}.hor_block.{i}.conv")
        places, buffers = places | more, buffers | stats
    places |= affine("score", f"{side}.guide_block.fc_attn")
    places[f"{side}.gate_params"] = Place("gate", lambda t: t.view(1))
    seen: dict[str, Tensor] = {}
    tail.register_forward_pre_hook(lambda _m, args: seen.update(args[0]))
    cotangent = case.tensors["input/cotangent"]

    def run() -> tuple[Tensor, Pairs]:
        (rows,) = tuner(batch).values()
        official = case.tensors["output/side"]
        tokens = in_cells(rows, batch, tuner.features[tuner.stream], 2)[0].view_as(case.tensors["output/tokens"])
        blend = as_maps(seen[tuner.stream], official)
        return (tokens * cotangent).sum(), {
            "side": (blend, official),
            "tokens": (tokens, case.tensors["output/tokens"]),
        }

    return Setup(tuner, places, run, buffers)


def unipt_maps(case: Case) -> Setup:
    c = case.config
    backbone, batch = staged(case)
    config = tuner_config("unipt-vse", {"reduction": c["embed"] // c["hidden"]})
    tuner = UniptVseConv(config, backbone, backbone.tail(None, "sdpa"), Want(joint=c["embed"]))
    places, buffers = conv_norm("aggregate.project", "projection_layer")
    for i in range(len(c["widths"])):
        more, stats = conv_norm(f"down.{i}", f"downsample_layers.{i}")
        places, buffers = places | more, buffers | stats
    convolutions = {f"guide.{i}": f"identity_layers.{i}.0" for i in range(len(tuner.guide))}
    convolutions["up"] = "upsample_layer.1"
    for ours, official in convolutions.items():
        places[f"{official}.weight"] = Place(f"{ours}.weight", lambda t: t[..., None, None])
        places[f"{official}.bias"] = Place(f"{ours}.bias")
    places |= affine("aggregate.confidence", "gate_layer")

    def run() -> tuple[Tensor, Pairs]:
        (tokens,) = tuner(batch).values()
        tokens = tokens.view_as(case.tensors["output/tokens"])
        total: Any = (tokens * case.tensors["input/cotangent"]).sum()
        return total, {"tokens": (tokens, case.tensors["output/tokens"])}

    return Setup(tuner, places, run, buffers)
