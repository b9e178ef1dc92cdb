"""Parameters of each tuner by its formula (methods §1.6, §2.4, §3, §4.2 and the tuners' own), from shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _norm(backbone: Any) -> int:
    """What `Backbone.norm` has: a T5 norm has no bias, post-norm encoders and CNNs have none."""
    D = backbone.width
    return {"t5": D, "decoder": D, "vit": 2 * D, "clip-text": 2 * D, "swin": 2 * D}.get(backbone.name, 0)


def probe(config: Any, backbone: Any) -> int:
    return 0


def sherl(config: Any, backbone: Any) -> int:
    D, d = backbone.width, backbone.width // config.reduction
    total = 0
    for stream in backbone.streams:
        live = stream == backbone.streams[-1]
        sets = 1 + len([i for i in config.kept(backbone, stream) if not live or i < backbone.depth(stream) - 1])
        total += sets * ((D * d + d) + 2 * (d * d + d)) + (d + 1) + 1 + (d * D + D) + _norm(backbone)
    return total


def sherl_conv(config: Any, backbone: Any) -> int:
    D, d = backbone.width, backbone.width // config.reduction
    taps = sum(backbone.width_of(s) * d + 3 * d for s in backbone.streams)
    return taps + (d + 1) + (d * D + 3 * D) + 1 + _norm(backbone)


def unipt(config: Any, backbone: Any) -> int:
    D, d, n = backbone.width, backbone.width // config.reduction, backbone.depth(backbone.streams[0]) + 1
    return n * (D * d + 3 * d) + (d + 1) + (d * d + 3 * d) + d * D + D


def unipt_conv(config: Any, backbone: Any) -> int:
    D, d = backbone.width, backbone.width // config.reduction
    finer = sum(D * c + c + c * d + 3 * d for c in map(backbone.width_of, backbone.streams[:-1]))
    return finer + (D * d + 3 * d) + (d + 1) + (d * d + 3 * d) + d * D + D


def sherl_vse(config: Any, backbone: Any) -> int:
    """The joint width is the backbone's where nothing is compared."""
    D, d, n = backbone.width, backbone.width // config.reduction, backbone.depth(backbone.streams[-1])
    return n * (D * d + 3 * d) + (d + 1) + (d * D + 3 * D) + 1 + _norm(backbone)


def lst(config: Any, backbone: Any) -> int:
    D, r = backbone.width, config.reduction
    d, raw = D // r, backbone.config
    total = 0
    for stream in backbone.streams:
        kept = config.kept(backbone, stream)
        if backbone.name == "t5":
            inner, f = raw.num_heads * (raw.d_kv // r), raw.d_ff // r
            attentions = 2 if stream == "decoder" else 1
            block, shared = attentions * (4 * d * inner + d) + 2 * d * f + d, 32 * raw.num_heads + d
        elif backbone.name == "bert":
            f = raw.intermediate_size // r
            block, shared = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 4 * d, 2 * d
        elif backbone.name == "decoder":  # a Llama whose heads keep their number
            inner = raw.num_attention_heads * raw.head_dim // r
            grouped = inner * raw.num_key_value_heads // raw.num_attention_heads
            block, shared = 2 * d * (inner + grouped) + 3 * d * (raw.intermediate_size // r) + 2 * d, d
        else:
            block, shared = 12 * d * d + 13 * d, 2 * d
        total += (D * d + d) + len(kept) * (D * d + d + block) + backbone.depth(stream) + shared
    return total + (d * D + D if backbone.writes_text else 0)


def qst(config: Any, backbone: Any) -> int:
    """An LST ladder with other ways down (through a rank, then a norm), a gate more and no map up that is left out."""
    D, d, n = backbone.width, backbone.width // config.reduction, backbone.depth("decoder")
    down = (D * config.rank + config.rank) + (config.rank * d + d) + 2 * d
    return lst(config, backbone) + (n + 1) * (down - D * d - d) + (d * D + D) + 1


def side_tuning(config: Any, backbone: Any) -> int:
    D, d = backbone.width, backbone.width // config.reduction
    return 2 * D * d + d + D + 1


def _tower(config: Any, backbone: Any) -> int:
    D, d, n = backbone.width, backbone.width // config.reduction, backbone.depth("encoder") + 1
    return n * (D * d + d) + 2 * D * d + d + D + (d + 1)


def sherl_clip(config: Any, backbone: Any) -> int:
    d, n = backbone.width // config.reduction, backbone.depth("encoder") + 1
    return _tower(config, backbone) + n * (d + 1)


def e3va(config: Any, backbone: Any) -> int:
    blocks = sum(backbone.width_of(s) * backbone.depth(s) for s in backbone.streams)
    return 12 * config.alpha * blocks + 3 * blocks + 2 * sum(map(backbone.width_of, backbone.streams))


FORMULAS: dict[tuple[str, str], Callable[[Any, Any], int]] = {
    ("probe", "sequence"): probe,
    ("probe", "pyramid"): probe,
    ("head2toe", "sequence"): probe,
    ("head2toe", "pyramid"): probe,
    ("sherl", "sequence"): sherl,
    ("sherl", "pyramid"): sherl_conv,
    ("unipt", "sequence"): unipt,
    ("unipt", "pyramid"): unipt_conv,
    ("sherl-vse", "sequence"): sherl_vse,
    ("sherl-vse", "pyramid"): sherl_conv,
    ("unipt-vse", "sequence"): unipt,
    ("unipt-vse", "pyramid"): unipt_conv,
    ("lst", "sequence"): lst,
    ("qst", "sequence"): qst,
    ("side-tuning", "sequence"): side_tuning,
    ("sherl-clip", "sequence"): sherl_clip,
    ("unipt-clip", "sequence"): _tower,
    ("e3va", "pyramid"): e3va,
    ("fixed", "pyramid"): lambda config, backbone: 0,
    ("fixed", "sequence"): lambda config, backbone: 0,
}
