"""SHERL and UniPT on CLIP4Clip's two towers, set up as a golden case says."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.extract.batch import Layout
from pipeline.train.objectives.contrastive import LARGEST, symmetric
from pipeline.train.objectives.retrieval import frames_mean, normalised
from pipeline.train.tuners.clip import SherlTower, Tower, UniptTower
from tests.golden import Case
from tests.golden.compare import Place, Setup
from tests.golden.texts import Pairs, affine


def clip4clip(case: Case) -> Setup:
    c, inputs = case.config, case.under("input")
    kind = SherlTower if case.repository.endswith("/SHERL") else UniptTower
    inner = c["joint"] // c["downsample_factor"]
    gated = {"gated": True} if c["datatype"] == "msrvtt" and kind is SherlTower else {}
    towers = {side: kind(c[side], c["joint"], c["states"], inner, **gated) for side in ("text", "image")}
    scale = inputs["logit_scale"].requires_grad_()
    places: dict[str, Place] = {}
    for side, tower in towers.items():
        places |= (_sherl if kind is SherlTower else _unipt)(side, tower)

    def run() -> tuple[Tensor, Pairs]:
        ids = inputs["input_ids"]
        texts = _correct(towers["text"], inputs, "text", ids != 0, ids.argmax(1), c["states"])
        shape = inputs["image.0"].shape
        every = torch.ones(shape[:2], dtype=torch.bool)
        frames = _correct(towers["image"], inputs, "image", every, torch.zeros(shape[0], dtype=torch.long), c["states"])
        cosines = _cosines(texts, frames, inputs["video_mask"])
        similarity = scale.clamp(max=LARGEST).exp() * cosines
        own = torch.arange(len(texts))
        loss = symmetric(cosines, torch.eye(len(own), dtype=torch.bool), scale)
        ours = {"text": texts, "frames": frames, "similarity": similarity, "loss": loss}
        return loss, {n: (t, case.tensors[f"output/{n}"]) for n, t in ours.items()}

    return Setup(nn.ModuleDict(towers), places, run, inputs={"logit_scale": scale})


def _correct(tower: Tower, inputs: dict[str, Tensor], side: str, mask: Tensor, position: Tensor, states: int) -> Tensor:
    """The tower's embeddings from the states of real positions; the pooled token stands at `position` (B,)."""
    layout = Layout.of(mask.sum(1).numpy().astype(np.int64))
    base = layout.first + (mask.long().cumsum(1) - 1).gather(1, position[:, None])[:, 0]
    return tower(inputs[f"{side}.pooled"], [inputs[f"{side}.{i}"][mask] for i in range(states)], layout, base)


def _cosines(texts: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
    """Of texts and videos; the frames beyond a video's own are none."""
    layout = Layout.of(mask.sum(1).numpy())
    return normalised(texts) @ frames_mean(normalised(frames[mask.flatten().bool()]), layout).t()


def _sherl(side: str, tower: Tower) -> dict[str, Place]:
    official = f"side_{'txt' if side == 'text' else 'img'}_block"
    places = affine(f"{side}.guide", f"{official}.hor_block_last.fc") | affine(f"{side}.up", f"{official}.fc_out")
    places |= affine(f"{side}.score", f"{official}.guide_block.layer_attn")
    if tower.gates is not None:
        places[f"{official}.guide_block.gate_parameters"] = Place(f"{side}.gates")
    for i in range(len(tower.down)):
        places |= affine(f"{side}.down.{i}", f"{official}.hor_block.{i}.fc")
        places |= affine(f"{side}.spatial.{i}", f"{official}.guide_block.spatial_attn.{i}")
    return places


def _unipt(side: str, tower: Tower) -> dict[str, Place]:
    official = f"{side}_adapter"
    places = affine(f"{side}.guide", f"{official}.downsample_layer.1")
    places |= affine(f"{side}.up", f"{official}.upsample_layer.1") | affine(f"{side}.score", f"{official}.gate_layer")
    for i in range(len(tower.down)):
        places |= affine(f"{side}.down.{i}", f"{official}.downsample_layers.{i}.1")
    return places
