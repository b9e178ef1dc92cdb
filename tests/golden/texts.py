"""SHERL and LST on T5, MTSA alone, and UniPT on BERT, set up as a golden case says."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.extract.backbones import Backbone, Batch
from pipeline.extract.batch import Layout
from pipeline.extract.pretrained import Checkpoint
from pipeline.train.features import Features, Want
from pipeline.train.model import Model
from pipeline.train.objectives import Answers, ObjectiveConfig
from pipeline.train.objectives.gpo import Gpo
from pipeline.train.objectives.label_text import LabelText
from pipeline.train.objectives.retrieval import normalised
from pipeline.train.tuners import tuner_config
from pipeline.train.tuners.mtsa import MTSA
from pipeline.train.tuners.vse import UniptVse
from tests.golden import Case
from tests.golden.compare import Place, Setup

Pairs = dict[str, tuple[Tensor, Tensor]]


def affine(ours: str, official: str) -> dict[str, Place]:
    """A map's or a norm's weight and bias."""
    return {f"{official}.{n}": Place(f"{ours}.{n}") for n in ("weight", "bias")}


def built(case: Case, config: dict[str, Any]) -> tuple[Backbone, Any]:
    """The case's frozen weights as a checkpoint on disk, loaded as any other: its family and the model."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(case.under("backbone"), folder / "model.safetensors", metadata={"format": "pt"})
        backbone = Checkpoint(folder, case.name).backbone
        return backbone, backbone.load(folder, torch.float32, "sdpa", "cpu")


def packed(case: Case, masks: dict[str, Tensor]) -> Batch:
    """The case's states, packed as `masks` (B, L) of each stream say; no columns yet."""
    states = {}
    for name, grid in case.under("input").items():
        stream, _, number = name.partition(".")
        if stream in masks and number.isdigit():
            states[name] = grid[masks[stream]]
    for mask in masks.values():
        assert (mask.long().diff() <= 0).all(), "padding stands behind the texts"
    return Batch(states, {}, {s: m.sum(1).numpy() for s, m in masks.items()})


def rerun(case: Case, backbone: Backbone, model: Any, batch: Batch) -> Pairs:
    """The frozen states, computed by our backbone from the case's ids."""
    with torch.no_grad():
        found = backbone.run(model, batch, list(batch.states))
    return {f"backbone {n}": (found[n], batch.states[n]) for n in batch.states}


def mtsa_places(ours: str, official: str, sets: int) -> dict[str, Place]:
    """MTSA in the T5 form: fc2 and fc3 of all sets lie side by side in one tensor."""
    places = {f"{official}gate_params": Place(f"{ours}gate", lambda t: t.view(1))}
    places |= affine(f"{ours}score", f"{official}guide_block.fc_attn") | affine(f"{ours}up", f"{official}fc_out")
    for i in range(sets):
        places |= affine(f"{ours}down.{i}", f"{official}hor_block.{i}.fc1")
        for half, name in enumerate(("fc2", "fc3")):
            places[f"{official}hor_block.{i}.{name}.weight"] = Place(
                f"{ours}mix_weight", lambda t, i=i, half=half: t[i].chunk(2, 1)[half].t()
            )
            places[f"{official}hor_block.{i}.{name}.bias"] = Place(
                f"{ours}mix_bias", lambda t, i=i, half=half: t[i, 0].chunk(2)[half]
            )
    return places


def mtsa(case: Case) -> Setup:
    c = case.config
    module = MTSA([c["width"]] * c["sets"], c["inner"], temperature=c["gate_T"])
    inputs = {n: t.requires_grad_() for n, t in case.under("input").items() if n.startswith("feature.")}

    def run() -> tuple[Tensor, Pairs]:
        rows = [inputs[f"feature.{i}"].flatten(0, 1) for i in range(c["sets"])]
        out = module(rows, inputs[c["last"]].flatten(0, 1)).view_as(inputs[c["last"]])
        return (out * case.tensors["input/cotangent"]).sum(), {"output": (out, case.tensors["output/output"])}

    return Setup(module, mtsa_places("", "", c["sets"]), run, inputs=inputs)


def t5_config(case: Case) -> dict[str, Any]:
    c, heads = case.config, case.config["heads"]
    inner = case.tensors["backbone/encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0]
    return {
        "model_type": "t5", "d_model": c["width"], "d_ff": c["ff"], "d_kv": inner // heads, "num_heads": heads,
        "num_layers": c["layers"], "vocab_size": c["vocab"], "feed_forward_proj": c["feed_forward_proj"],
        "tie_word_embeddings": c["tie_word_embeddings"], "decoder_start_token_id": 0, "pad_token_id": 0,
        "eos_token_id": 1,
    }  # fmt: skip


class OnT5:
    """What SHERL's and LST's cases on T5 share: backbone, batch and model."""

    def __init__(self, case: Case, tuner: str) -> None:
        c, inputs = case.config, case.under("input")
        self.case = case
        self.masks = {"encoder": inputs["attention_mask"].bool(), "decoder": inputs["labels"] != -100}
        self.backbone, backbone_model = built(case, t5_config(case))
        self.batch = packed(case, self.masks)
        self.batch.columns = {
            "encoder.ids": inputs["input_ids"][self.masks["encoder"]],
            "decoder.ids": inputs["decoder_input_ids"][self.masks["decoder"]],
            "decoder.parent": torch.cat([torch.arange(-1, n - 1) for n in self.batch.lengths["decoder"].tolist()]),
        }
        self.batch.targets = {"label": torch.arange(len(self.batch))}
        own = [row[row != -100].tolist() for row in inputs["labels"]]
        config = tuner_config(tuner, {"reduction": c["reduction"], "layers": c["kept"], "temperature": c["gate_T"]})
        tail = self.backbone.tail(self.backbone.tail_weights(backbone_model), "sdpa")
        objective = LabelText(ObjectiveConfig(), Answers.of_classes(len(own), own))
        self.model = Model.build(tuner, config, self.backbone, tail, objective)
        self.states = rerun(case, self.backbone, backbone_model, self.batch)

    def official(self, name: str) -> Tensor:
        """An output of the file at real positions. Its name begins with its stream; logits are the decoder's."""
        stream = name.partition(".")[0]
        return self.case.tensors[f"output/{name}"][self.masks["decoder" if name == "logits" else stream]]

    def read(self, hooked: dict[str, nn.Module], forward: Any) -> tuple[Any, Pairs]:
        """`forward()` and what the modules gave in it, beside the outputs of those names."""
        given: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _args: Any, out: Any) -> None:
                given[name] = out[0] if isinstance(out, tuple) else out

            return hook

        handles = [module.register_forward_hook(keep(name)) for name, module in hooked.items()]
        out = forward()
        for handle in handles:
            handle.remove()
        rows = {n: self.batch.layout(n.partition(".")[0]).unpad(t) if t.ndim == 3 else t for n, t in given.items()}
        return out, {n: (t, self.official(n)) for n, t in rows.items()}

    def finish(self, features: Features) -> tuple[Tensor, Pairs]:
        """Loss and logits from what the tuner hands out, and the frozen states run again."""
        (loss,) = self.model.head.losses(features, self.batch).values()
        (rows,) = features.values()
        pairs = {
            "logits": (self.model.tuner.tail.logits(rows), self.official("logits")),
            "loss": (loss, self.case.tensors["output/loss"]),
        }
        return loss, pairs | self.states


def sherl_t5(case: Case) -> Setup:
    on = OnT5(case, "sherl")
    tuner: Any = on.model.tuner
    places: dict[str, Place] = {}
    hooked = {}
    for s, names in tuner.names.items():
        places |= mtsa_places(f"mtsa.{s}.", f"{s}.side_mtsa_block.", len(names) + 1)
        places[f"{s}.final_side_layer_norm.weight"] = Place(f"norm.{s}.weight")
        hooked |= {f"{s}.mtsa": tuner.mtsa[s], f"{s}.side_norm": tuner.norm[s]}

    def run() -> tuple[Tensor, Pairs]:
        features, pairs = on.read(hooked, lambda: tuner(on.batch))
        loss, more = on.finish(features)
        return loss, pairs | more

    return Setup(tuner, places, run)


def lst_t5(case: Case) -> Setup:
    on = OnT5(case, "lst")
    tuner: Any = on.model.tuner
    places = affine("up", "side_final_upsample")
    hooked: dict[str, nn.Module] = {}
    for s, ladder in tuner.ladders.items():
        ours = f"ladders.{s}"
        for i in range(on.backbone.depth(s)):
            places[f"{s}.side_gate_params.{i}"] = Place(f"{ours}.gates", lambda t, i=i: t[i : i + 1])
        places |= affine(f"{ours}.first", f"{s}.side_first_downsample")
        places[f"{s}.final_side_layer_norm.weight"] = Place(f"{ours}.side.norm.weight")
        hooked[f"{s}.side_norm"] = ladder.side.norm
        for k, i in enumerate(ladder.layers):
            places |= affine(f"{ours}.down.{k}", f"{s}.side_downsamples.{i}")
            hooked[f"{s}.side_block.{i}"] = block = ladder.side.blocks[k]
            for name, _ in block.named_parameters():
                places[f"{s}.side_block.{i}.{name}"] = Place(f"{ours}.side.blocks.{k}.{name}")

    def steps() -> None:
        """The ladders on the whole grid: in training, a batch is cut into parts of like length."""
        rows = None
        for stream, ladder in tuner.ladders.items():
            rows = ladder(ladder.rungs(on.batch, tuner.tail.embed(on.batch, stream)), on.batch, rows)

    def run() -> tuple[Tensor, Pairs]:
        _, pairs = on.read(hooked, steps)
        loss, more = on.finish(tuner(on.batch))
        return loss, pairs | more

    return Setup(tuner, places, run)


def unipt_bert(case: Case) -> Setup:
    backbone, batch, tail, mask, states, _ = on_bert(case)
    c, inputs = case.config, case.under("input")
    tuner = UniptVse(tuner_config("unipt-vse", {"reduction": c["factor"]}), backbone, tail, Want(joint=c["joint"]))
    side = "side_tuning_module"
    ours = "side.aggregate"
    places = affine(f"{ours}.confidence", f"{side}.gate_layer") | affine("side.up", f"{side}.upsample_layer.1")
    for part in (0, 1):
        places |= affine(f"{ours}.project.{part}", f"{side}.projection_layer.{part}")
        for i in range(c["layers"] + 1):
            places |= affine(f"side.down.{i}.{part}", f"{side}.downsample_layers.{i}.{part}")
    module = nn.ModuleDict({"side": tuner, "gpo": Gpo()})
    places |= {f"gpool.{n}": Place(f"gpo.{n}") for n, _ in Gpo().named_parameters()}

    def run() -> tuple[Tensor, Pairs]:
        (rows,) = tuner(batch).values()
        pairs: Pairs = {"side": (rows, case.tensors["output/side"][mask]), **states}
        pooled, more = read_out(case, module["gpo"], batch.layout("encoder"), rows)
        return (pooled * inputs["cotangent"]).sum(), pairs | more

    return Setup(module, places, run)


def on_bert(case: Case) -> tuple[Backbone, Batch, Any, Tensor, Pairs, Any]:
    """A case's BERT: backbone, batch, tail, mask of real positions, its states rerun, and the model."""
    c, inputs = case.config, case.under("input")
    frozen = case.under("backbone")
    config = {
        "model_type": "bert", "hidden_size": c["D"], "num_hidden_layers": c["layers"],
        "num_attention_heads": c["heads"], "vocab_size": c["vocab"], "pad_token_id": 0,
        "intermediate_size": frozen["encoder.layer.0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": frozen["embeddings.position_embeddings.weight"].shape[0],
        "type_vocab_size": frozen["embeddings.token_type_embeddings.weight"].shape[0],
    }  # fmt: skip
    backbone, model = built(case, config)
    mask = inputs["attention_mask"].bool()
    batch = packed(case, {"encoder": mask})
    ids = inputs["input_ids"][mask]
    batch.columns = {"encoder.ids": ids, "encoder.types": torch.zeros_like(ids)}
    tail = backbone.tail(backbone.tail_weights(model), "sdpa")
    return backbone, batch, tail, mask, rerun(case, backbone, model, batch), model


def read_out(case: Case, gpo: Any, layout: Layout, rows: Tensor) -> tuple[Tensor, Pairs]:
    """VSE∞'s way from rows to an embedding: GPO and the l2 norm, and the pairs of their outputs."""
    pooled, weights = gpo(rows, layout), gpo.weights(layout.lengths.numpy(), rows.device)[..., None]
    embedding, grid = normalised(pooled), layout.pad(rows)
    official = case.under("output")
    pairs: Pairs = {
        "gpo": (pooled, official["gpo"]),
        "gpo.weights": (weights, official["gpo.weights"]),
        "gpo.input": (rows, official["gpo.input"][:, : grid.shape[1]][layout.mask]),
        "embedding": (embedding, official["embedding"]),
    }
    return embedding, pairs
