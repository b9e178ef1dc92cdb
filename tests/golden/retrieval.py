"""VSE∞: SHERL on BERT in its form there, GPO, the hinge loss and the ranks, set up as a golden case says."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.extract.batch import Layout
from pipeline.train.features import Want
from pipeline.train.objectives.gpo import Gpo
from pipeline.train.objectives.hinge import hinge
from pipeline.train.objectives.ranking import ranks, scores
from pipeline.train.objectives.retrieval import normalised
from pipeline.train.tuners import tuner_config
from pipeline.train.tuners.vse import SherlVse
from tests.golden import Case
from tests.golden.compare import MODES, Place, Setup, scaled
from tests.golden.texts import Pairs, affine, on_bert, read_out


def sherl_bert(case: Case) -> Setup:
    backbone, batch, tail, mask, states, model = on_bert(case)
    if factor := MODES[case.mode]:
        batch.states |= dropped_inside(case, model, mask, factor)
    c, inputs = case.config, case.under("input")
    tuner: Any = SherlVse(tuner_config("sherl-vse", {"reduction": c["factor"]}), backbone, tail, Want(joint=c["joint"]))
    places = {"side_module.gate_params": Place("side.gate", lambda t: t.view(1))}
    places |= affine("side.score", "side_module.guide_block.fc_attn") | affine("map", "text_fc")
    for part in (0, 1):
        places |= affine(f"side.up.{part}", f"side_module.fc_out.{part + 1}")
        for i in range(c["layers"]):
            places |= affine(f"side.down.{i}.{part}", f"side_module.hor_block.{i}.fc.{part}")
    module = nn.ModuleDict({"side": tuner, "map": nn.Linear(c["D"], c["joint"]), "gpo": Gpo()})
    places |= {f"text_agg.{n}": Place(f"gpo.{n}") for n, _ in Gpo().named_parameters()}
    entering: list[Tensor] = []
    tail.register_forward_pre_hook(lambda _m, args: entering.append(args[0]["encoder"]))

    def run() -> tuple[Tensor, Pairs]:
        entering.clear()
        (rows,) = tuner(batch).values()
        pairs: Pairs = {"side": (entering[0], case.tensors["output/side"][mask]), **states}
        pooled, more = read_out(case, module["gpo"], batch.layout("encoder"), module["map"](rows))
        return (pooled * inputs["cotangent"]).sum(), pairs | more

    return Setup(module, places, run)


def dropped_inside(case: Case, model: Any, mask: Tensor, factor: float) -> dict[str, Tensor]:
    """What the frozen layers give from the clean embedding with their own dropout on, as when these numbers were made;
    the states in the file are the clean ones, and ours never drop there."""
    inputs = case.under("input")
    seen = (1.0 - inputs["attention_mask"][:, None, None].float()) * torch.finfo(torch.float32).min
    rows, found = inputs["encoder.embedding"], {}
    model.train()
    with scaled(factor), torch.no_grad():
        for i, layer in enumerate(model.encoder.layer[:-1]):
            out = layer(rows, seen)
            rows = out[0] if isinstance(out, tuple) else out
            found[f"encoder.{i}"] = rows[mask]
    model.eval()
    return found


def gpo(case: Case) -> Setup:
    module, inputs = (
        Gpo(case.config["positions"], case.config["hidden"], case.config["temperature"]),
        case.under("input"),
    )
    features, layout = inputs["features"].requires_grad_(), Layout.of(inputs["lengths"].numpy())
    places = {name: Place(name) for name, _ in module.named_parameters()}

    def run() -> tuple[Tensor, Pairs]:
        pooled = module(layout.unpad(features[:, : layout.mask.shape[1]]), layout)
        weights = module.weights(inputs["lengths"].numpy(), features.device)[..., None]
        official = case.under("output")
        pairs = {"pooled": (pooled, official["pooled"]), "weights": (weights, official["weights"])}
        return (pooled * inputs["cotangent"]).sum(), pairs

    return Setup(module, places, run, inputs={"features": features})


def hinge_loss(case: Case) -> Setup:
    """Both phases of the schedule, each with its own gradient of images and captions."""
    inputs, official = case.under("input"), case.under("output")
    phases = ("all_negatives", "max_violation")
    leaves = {
        f"{side}.{phase}": inputs[side].clone().requires_grad_() for side in ("images", "captions") for phase in phases
    }

    def run() -> tuple[Tensor, Pairs]:
        pairs: Pairs = {}
        own = torch.eye(case.config["pairs"], dtype=torch.bool)
        for phase in phases:
            similar = normalised(leaves[f"images.{phase}"]) @ normalised(leaves[f"captions.{phase}"]).t()
            loss = hinge(similar, own, case.config["margin"], phase == "max_violation")
            pairs |= {
                "similarity": (similar, official["similarity"]),
                f"loss.{phase}": (loss, official[f"loss.{phase}"]),
            }
        return pairs["loss.all_negatives"][0] + pairs["loss.max_violation"][0], pairs

    return Setup(nn.Module(), {}, run, inputs=leaves)


def ranking(case: Case) -> Setup:
    inputs, official, c = case.under("input"), case.under("output"), case.config
    images, captions = inputs["images"], inputs["captions"]
    texts = np.arange(len(captions))
    pairs = np.stack([texts // c["captions_an_image"], texts], 1)

    def run() -> tuple[Tensor, Pairs]:
        found: Pairs = {"similarity": (images @ captions.t(), official["similarity"])}
        figures = scores([images, captions], pairs, ("i2t", "t2i"))
        found["rsum"] = (torch.tensor(figures["rsum"]), official["rsum"])
        for way, name, sides in (("i2t", "image_to_text", (0, 1)), ("t2i", "text_to_image", (1, 0))):
            a, b = (images, captions) if way == "i2t" else (captions, images)
            rank = torch.from_numpy(ranks(a, b, pairs[:, sides])).float()
            told = [*(figures[f"{way}_r{k}"] for k in (1, 5, 10)), figures[f"{way}_median"], float(rank.mean()) + 1]
            found[name] = (torch.tensor(told), official[name])
            found[f"ranks.{name}"] = (rank, official[f"ranks.{name}"])
            found[f"first.{name}"] = ((a @ b.t()).argmax(1).float(), official[f"first.{name}"])
        return torch.zeros((), requires_grad=True).clone(), found

    return Setup(nn.Module(), {}, run)
