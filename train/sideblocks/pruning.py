"""Structural pruning of a backbone to the shapes of its side network (LST §3.3): which rows and columns stay.

The walk goes through the maps in the order they are applied and carries one set of channels P. A map keeps the columns
P; its rows are scored by the L1 norm of their importance over those columns and the best stay. Maps that share input
and output (queries, keys and values; a gated feed-forward's two) are scored by the product of their importances and
keep the same rows.

*Running* is the released code's form: after every map, P is the set of rows just chosen, in the released order (see
`released_order`). The residual stream is then not aligned (each sublayer adds channels of its own choice to it), rows
of attention are chosen across heads, and the side network's heads are the kept rows cut into equal runs.
*Aligned* is ours: one set of residual channels, scored over every map that reads or writes the stream, serves them
all, every attention head keeps an equal share of its rows, and all stay in ascending order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.store.errors import UserError

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Maps:
    """Linear maps with the same input and output, `targets[i]` pruned from `sources[i]`. `keep`: rows that stay.
    `residual`: the rows are channels of the residual stream, else the columns are. `heads`: groups of rows."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    keep: int
    residual: bool = False
    heads: int = 1


@dataclass(frozen=True)
class Norm:
    """A norm over the residual stream."""

    source: str
    target: str


Step = Maps | Norm


def best(score: Tensor, keep: int, heads: int = 1) -> Tensor:
    """Indices of the `keep` largest of `score` (n,), ascending; an equal share from each of `heads` runs of it."""
    groups = score.view(heads, -1)
    top = groups.argsort(dim=1, descending=True, stable=True)[:, : keep // heads]
    offset = torch.arange(heads, device=score.device)[:, None] * groups.shape[1]
    return (top + offset).flatten().sort().values


def released_order(rows: Tensor, total: int) -> Tensor:
    """`rows`, some of 0 … `total` - 1, in the order in which the released code keeps them: it takes the difference of
    two Python sets of ints and lists it. CPython's order: a place in a hash table follows from the int and from how
    many there are, so it is the same in every run."""
    every = set(range(total))
    pruned = every - set(rows.tolist())
    return torch.tensor(list(every - pruned), device=rows.device)


def residual_scores(first: Tensor, importance: Tensors, steps: Iterable[Step]) -> Tensor:
    """(D,) importance of each residual channel over the embedding and all maps that read or write it."""
    total = first.double()
    for step in steps:
        if isinstance(step, Maps):
            for source in step.sources:
                total = total + importance[f"{source}.weight"].double().sum(1 if step.residual else 0)
    return total


def prune(
    parameters: Tensors, importance: Tensors, first: Tensor, steps: Sequence[Step], width: int, aligned: bool
) -> dict[str, Tensor]:
    """The pruned tensors by target name, float32 on the host. `first`: (D,) score of each residual channel in the
    embedding; `width`: residual channels that stay. See the module for the two forms."""
    out: dict[str, Tensor] = {}

    def chosen(score: Tensor, keep: int, heads: int = 1) -> Tensor:
        return best(score, keep, heads) if aligned else released_order(best(score, keep), len(score))

    kept = residual = chosen(residual_scores(first, importance, steps) if aligned else first.double(), width)
    for step in steps:
        if isinstance(step, Norm):
            for part in ("weight", "bias"):
                if (vector := parameters.get(f"{step.source}.{part}")) is not None:
                    out[f"{step.target}.{part}"] = vector[kept]
            continue
        score = math.prod(importance[f"{s}.weight"].double()[:, kept] for s in step.sources)
        assert isinstance(score, Tensor)
        rows = residual if aligned and step.residual else chosen(score.sum(1), step.keep, step.heads)
        for source, target in zip(step.sources, step.targets, strict=True):
            out[f"{target}.weight"] = parameters[f"{source}.weight"][rows][:, kept]
            if (bias := parameters.get(f"{source}.bias")) is not None:
                out[f"{target}.bias"] = bias[rows]
        kept = rows
    return {k: v.detach().float().cpu().contiguous() for k, v in out.items()}


def prune_t5(config: Any, parameters: Tensors, importance: Tensors, reduction: int, aligned: bool) -> dict[str, Tensor]:
    """T5: the decoder goes on from the encoder's last set; relative position biases are copied whole."""
    width, heads = config.d_model // reduction, config.num_heads
    inner, hidden = heads * (config.d_kv // reduction), config.d_ff // reduction
    steps: list[Step] = []
    out: dict[str, Tensor] = {}
    for stream, depth in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
        for i in range(depth):
            source, target = f"{stream}.block.{i}.layer", f"{stream}.{i}.layer"
            kinds = ["SelfAttention", "EncDecAttention"] if stream == "decoder" else ["SelfAttention"]
            for n, kind in enumerate(kinds):
                steps.append(Norm(f"{source}.{n}.layer_norm", f"{target}.{n}.layer_norm"))
                steps += _maps(
                    f"{source}.{n}.{kind}", f"{target}.{n}.{kind}", ("q", "k", "v"), inner, "o", width, heads
                )
            n = len(kinds)
            wide = ("wi_0", "wi_1") if config.is_gated_act else ("wi",)
            steps.append(Norm(f"{source}.{n}.layer_norm", f"{target}.{n}.layer_norm"))
            steps += _maps(f"{source}.{n}.DenseReluDense", f"{target}.{n}.DenseReluDense", wide, hidden, "wo", width)
        steps.append(Norm(f"{stream}.final_layer_norm", f"{stream}.norm"))
        bias = "layer.0.SelfAttention.relative_attention_bias.weight"
        out[f"{stream}.0.{bias}"] = parameters[f"{stream}.block.0.{bias}"].detach().float().cpu().contiguous()
    return out | prune(parameters, importance, importance["shared.weight"].sum(0), steps, width, aligned)


def prune_bert(
    config: Any, parameters: Tensors, importance: Tensors, reduction: int, aligned: bool
) -> dict[str, Tensor]:
    """Post-norm encoders; the first set comes from the word embeddings. The side network's final norm stays fresh."""
    width, hidden = config.hidden_size // reduction, config.intermediate_size // reduction
    heads = config.num_attention_heads
    steps: list[Step] = []
    for i in range(config.num_hidden_layers):
        source, target = f"encoder.layer.{i}", f"encoder.{i}"
        asked = tuple(f"attention.self.{n}" for n in ("query", "key", "value"))
        steps += _maps(source, target, asked, width, "attention.output.dense", width, heads)
        steps.append(Norm(f"{source}.attention.output.LayerNorm", f"{target}.attention.output.LayerNorm"))
        steps += _maps(source, target, ("intermediate.dense",), hidden, "output.dense", width)
        steps.append(Norm(f"{source}.output.LayerNorm", f"{target}.output.LayerNorm"))
    first = importance["embeddings.word_embeddings.weight"].sum(0)
    return prune(parameters, importance, first, steps, width, aligned)


# Names of a pre-norm block's parts in timm, transformers' ViT and transformers' CLIP: the first that is there counts.
_VIT = {
    "norm1": ("norm1", "layernorm_before", "layer_norm1"),
    "q": ("attn.q", "attention.q_proj", "self_attn.q_proj"),
    "k": ("attn.k", "attention.k_proj", "self_attn.k_proj"),
    "v": ("attn.v", "attention.v_proj", "self_attn.v_proj"),
    "self_attn.out_proj": ("attn.proj", "attention.o_proj", "self_attn.out_proj"),
    "norm2": ("norm2", "layernorm_after", "layer_norm2"),
    "linear1": ("mlp.fc1",),
    "linear2": ("mlp.fc2",),
}
_FIRST = (
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embedding.weight",
)


def prune_vit(
    parameters: Tensors, importance: Tensors, blocks: str, final: str, heads: int, reduction: int, aligned: bool
) -> dict[str, Tensor]:
    """Pre-norm encoders of images and of CLIP's texts, to torch's own transformer blocks. `blocks`, `final`: names of
    the list of blocks and of the norm after them; the first set comes from the patch (or token) embedding."""
    parameters, importance = _unfused(parameters), _unfused(importance)
    depth = 1 + max(int(n.removeprefix(f"{blocks}.").split(".")[0]) for n in parameters if n.startswith(f"{blocks}."))
    patches = next((n for n in _FIRST if n in importance), None)
    first = importance[patches].flatten(1).sum(1) if patches else importance["embeddings.token_embedding.weight"].sum(0)
    width = len(first) // reduction
    heads = heads if math.gcd(width, heads) == heads else 1
    steps: list[Step] = []
    for i in range(depth):
        at = f"{blocks}.{i}"
        own = {
            k: next((f"{at}.{n}" for n in names if f"{at}.{n}.weight" in parameters), "") for k, names in _VIT.items()
        }
        if not all(own.values()) or len(parameters[f"{own['linear1']}.weight"]) < 4 * width:
            raise UserError("init: the blocks of this backbone are not of the form that pruning knows; use random")
        there = {k: f"encoder.{i}.{k}" for k in own}
        steps.append(Norm(own["norm1"], there["norm1"]))
        steps.append(Maps(tuple(own[k] for k in "qkv"), tuple(there[k] for k in "qkv"), width, heads=heads))
        steps.append(Maps((own["self_attn.out_proj"],), (there["self_attn.out_proj"],), width, residual=True))
        steps.append(Norm(own["norm2"], there["norm2"]))
        steps.append(Maps((own["linear1"],), (there["linear1"],), 4 * width))
        steps.append(Maps((own["linear2"],), (there["linear2"],), width, residual=True))
    steps.append(Norm(final, "encoder.norm"))
    out = prune(parameters, importance, first, steps, width, aligned)
    for i in range(depth):
        three = [f"encoder.{i}.{k}" for k in "qkv"]
        weights, biases = [out.pop(f"{n}.weight") for n in three], [out.pop(f"{n}.bias", None) for n in three]
        out[f"encoder.{i}.self_attn.in_proj_weight"] = torch.cat(weights)
        zero = torch.zeros(width)
        out[f"encoder.{i}.self_attn.in_proj_bias"] = torch.cat([zero if b is None else b for b in biases])
    return out


def _maps(
    source: str, target: str, wide: tuple[str, ...], inner: int, back: str, width: int, heads: int = 1
) -> list[Step]:
    """A sublayer: maps out of the residual stream, and the one map back."""
    return [
        Maps(tuple(f"{source}.{n}" for n in wide), tuple(f"{target}.{n}" for n in wide), inner, heads=heads),
        Maps((f"{source}.{back}",), (f"{target}.{back}",), width, residual=True),
    ]


def _unfused(tensors: Tensors) -> dict[str, Tensor]:
    """timm keeps queries, keys and values in one map."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".qkv." in name:
            out |= {name.replace(".qkv.", f".{k}."): t for k, t in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            out[name] = tensor
    return out
