"""What a decoder-only model of transformers is around its layers: embedding, masks, rotary angles, the last norm.

The library's own model is built with its layers replaced by recorders. Running it gives what it hands to each layer
(the embedding output, masks by the layer's kind, rotary angles, the cache), so that layers can be run one by one, on
other hidden states, exactly as the library would; nothing of that is written again here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.initialization import no_init_weights

from pipeline.store.errors import UserError

# model type → attributes of the text model that hold its layers and its last norm
PLACES = {
    "gpt2": ("h", "ln_f"),
    "gpt_bigcode": ("h", "ln_f"),
    "gpt_neox": ("layers", "final_layer_norm"),
    "phi": ("layers", "final_layernorm"),
}
USUAL = ("layers", "norm")
# Lists in a configuration with an entry for each layer.
_BY_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")
# Widths inside a layer, which a side network has a share of.
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "n_inner")


def places(config: Any) -> tuple[str, str]:
    """The attributes of the text model of `config` that hold its layers and its last norm."""
    return PLACES.get(config.model_type, USUAL)


def layers_of(model: Any, config: Any) -> nn.ModuleList:
    """The layers of a loaded causal language model."""
    found: nn.ModuleList = getattr(model.base_model, places(config)[0])
    return found


def norm_of(model: Any, config: Any) -> nn.Module:
    """The norm after the last layer of a loaded causal language model."""
    found: nn.Module = getattr(model.base_model, places(config)[1])
    return found


def cache_option(model: Any, cache: Any) -> dict[str, Any]:
    """What a text model is called with to fill `cache`, if any: the library has changed the option's name."""
    if cache is None:
        return {"use_cache": False}
    known = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache, "use_cache": True}


def is_tied(model: Any) -> bool:
    """Whether the head's table is the embedding's."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def cut(config: Any, layers: Sequence[int], attention: str) -> Any:
    """`config` of a model that has the layers `layers` alone."""
    small = copy.deepcopy(config)
    small._attn_implementation = attention
    for name in _BY_LAYER:
        if kinds := getattr(small, name, None):
            setattr(small, name, [kinds[i] for i in layers])
    if getattr(small, "mlp_only_layers", None) is not None:
        small.mlp_only_layers = [k for k, i in enumerate(layers) if i in config.mlp_only_layers]
    small.num_hidden_layers = len(layers)
    return small


def narrow(config: Any, layers: Sequence[int], reduction: int, attention: str) -> Any:
    """`config` of a side network: the layers `layers` at 1 / `reduction` of the width, of the feed-forward width and of
    a head's. The number of heads is kept where a head then has an even width of 2 at least (rotary angles come in
    pairs), else there are fewer. Positions turn at the backbone's base frequency, without stretching for longer texts.
    UserError where nothing of that fits."""
    side = cut(config, layers, attention)
    heads, width = config.num_attention_heads, config.hidden_size // reduction
    groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
    inner = heads * head_width(config) // reduction
    fitting = [h for h in range(heads, 0, -1) if inner % (2 * h) == 0 and heads % h == 0 and h % min(groups, h) == 0]
    if getattr(config, "head_dim", None) is None:
        fitting = [h for h in fitting if width % h == 0]
    if not fitting:
        raise UserError(f"reduction: no head of even width fits a side network of width {width}; give a smaller one")
    side.hidden_size, side.num_attention_heads = width, fitting[0]
    if getattr(config, "num_key_value_heads", None):
        side.num_key_value_heads = fitting[0] // min(groups, fitting[0])
    each = inner // fitting[0]
    if getattr(config, "head_dim", None) is not None:
        side.head_dim = each
    for name in _WIDTHS:
        if getattr(config, name, None):
            setattr(side, name, max(1, getattr(config, name) // reduction))
    if hasattr(config, "query_pre_attn_scalar"):
        side.query_pre_attn_scalar = each
    if hasattr(config, "attention_multiplier"):
        side.attention_multiplier = each**-0.5
    if getattr(config, "rope_parameters", None):
        side.rope_parameters = _unstretched(config.rope_parameters)
    side.vocab_size, side.pad_token_id = 1, None
    side._experts_implementation = "eager"  # grouped products want wider experts than these
    return side


def head_width(config: Any) -> int:
    """The width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _unstretched(rope: Any) -> Any:
    if "rope_theta" in rope:
        whole = {"partial_rotary_factor": 1.0} if "partial_rotary_factor" in rope else {}
        return {"rope_type": "default", "rope_theta": rope["rope_theta"], **whole}
    return {kind: _unstretched(own) if isinstance(own, dict) else own for kind, own in rope.items()}


class _Recorder(nn.Module):
    """Stands where a layer stood: keeps what it is given and hands the hidden state on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)
        self.hidden: Any = None
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.given = hidden, (args, kwargs)
        return hidden


Given = tuple[tuple[Any, ...], dict[str, Any]]  # what a layer gets beside the hidden state


class Shell(nn.Module):
    """The text model of `config` without its layers and its norm. What `parts` gives is the rest of it: the layers, the
    norm, and the head (None where its table is the embedding's).

    With `drawn` False parameters hold anything, until weights are loaded."""

    def __init__(self, config: Any, drawn: bool = False) -> None:
        super().__init__()
        attention = config._attn_implementation
        if drawn:
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        else:
            with no_init_weights():
                model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
            model.tie_weights()
        layers, norm = places(config)
        self.config, self.model = config, model.base_model
        found = getattr(self.model, layers)
        parts = (found, getattr(self.model, norm), None if is_tied(model) else model.get_output_embeddings())
        object.__setattr__(self, "_parts", parts)  # not this module's
        self.recorders = [_Recorder(layer) for layer in found]
        setattr(self.model, layers, nn.ModuleList(self.recorders))
        setattr(self.model, norm, nn.Identity())

    def parts(self) -> tuple[nn.ModuleList, nn.Module, nn.Linear | None]:
        """Layers, norm and head, handed out once."""
        parts: Any = self._parts
        object.__setattr__(self, "_parts", None)
        return parts

    def new_cache(self) -> DynamicCache:
        """An empty cache of keys and values for this model's layers."""
        return DynamicCache(config=self.config)

    @property
    def table(self) -> Tensor:
        """The embedding's table, which a tied head shares."""
        found: Tensor = self.model.get_input_embeddings().weight
        return found

    def embed(self, ids: Tensor, start: int = 0) -> Tensor:
        """(B, L) ids at the positions from `start` on → (B, L, width), what enters the first layer."""
        # Positions from 0 on are the library's own choice, without a look at their values.
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None] if start else None
        self.model(input_ids=ids, position_ids=positions, use_cache=False)
        return self._take()[0]

    def given(self, hidden: Tensor, cache: Any = None) -> list[Given]:
        """What each layer gets beside hidden states of the shape of `hidden` (B, L, width). Samples are padded on the
        right, and under causal attention no real position sees what comes after it: there is no mask of padding."""
        self.model(inputs_embeds=hidden.detach(), **cache_option(self.model, cache))
        return self._take()[1]

    def _take(self) -> tuple[Tensor, list[Given]]:
        first, given = self.recorders[0].hidden, [r.given for r in self.recorders]
        for recorder in self.recorders:
            recorder.hidden, recorder.given = None, ((), {})
        return first, given
