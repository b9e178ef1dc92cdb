"""SHERL (Diao et al., ECCV 2024): blend the shallow features, then run the last backbone layer live on the blend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.extract.backbones.base import Family, Tail
from pipeline.extract.backbones.batch import Batch
from pipeline.extract.backbones.dropout import Dropout
from pipeline.extract.options import option
from pipeline.store.errors import UserError
from pipeline.train.features import Features, Want
from pipeline.train.tuners.base import Tuner, TunerConfig, checked_reduction, register, rows_of
from pipeline.train.tuners.livelayers import SIZED, TAILS, LiveLayers, saved_size
from pipeline.train.tuners.mtsa import BLENDS, MTSA


@dataclass(frozen=True)
class SherlConfig(TunerConfig):
    """`reduction`: r, side width is D / r. `gate`: start of alpha; 0 is the paper's (the live layer then sees the
    blend only), 0.1 starts the gate at u = 0.76. None: 0 on text-to-text backbones, 0.1 on encoders, where the paper's
    start is fragile (methods §8; a deviation, and the papers have no such rows). `temperature`: T of the gate.
    `blend`: "redundancy" is SHERL; "max", "average", "mhsa", "linear" and "linear-learned" are the ablations of its
    Fig. 4 (MaxPool, AvePool, MHSA, LinearA, LinearA(r)); "attention" is ours.

    `insert`: where the blend of the last stream enters. "last": the last layer. "single:S": layer S; those after it run
    on its output. "multi:S": every layer from S on gets a blend of its own, of all features before it (Figs 6, 9).
    "none": no layer is live, the blend of the same features is the output ("(-) Regulate" of Fig. 5); on text-to-text
    backbones nothing then reads the encoder's blend, so there is none.
    `tail`: what trains inside the live layers (Fig. 5): "frozen", nothing; "lora", "bitfit", "adapter" or "prompt".
    `tail_size`: LoRA's rank, the adapter's width or the prompt's rows; the paper's by default (see `LiveLayers`).
    `recompute`: compute the blend again in the backward pass instead of keeping what lies between: less memory, the
    same numbers, a longer step."""

    reduction: int = option(8, "Side width is the backbone's over this.", least=1)
    gate: float | None = option(
        None, "Start of the gate alpha. Default: 0, the paper's, on T5; 0.1 on encoders, where that is calmer."
    )
    temperature: float = option(0.1, "Temperature of the gate.", above=0)
    blend: str = option(
        "redundancy",
        "How layers are blended: redundancy is the method. Its Fig. 4 has max, average, mhsa (self-attention over "
        "layers), linear and linear-learned (a learned redundancy); attention, from the guide, is ours.",
        choices=BLENDS,
    )
    insert: str = option(
        "last",
        "Where the blend enters: last, the last layer; single:S, layer S, those after it as they are; multi:S, each "
        "layer from S on gets a blend of its own (Figs 6 and 9); none: no layer is live, the blend is the output "
        "(Fig 5). Extract with the same.",
        metavar="last|none|single:S|multi:S",
        extraction=True,
    )
    tail: str = option("frozen", "What trains inside the live layers (Fig 5); frozen: nothing.", choices=TAILS)
    tail_size: int | None = option(
        None,
        "Size of what --tail adds: LoRA's rank, the adapter's width, virtual rows. Default: the paper's, a sixteenth "
        "of the backbone's width, or 30 rows.",
    )
    recompute: bool = option(False, "Compute the blend again in the backward pass; less memory, a longer step.")

    def __post_init__(self) -> None:
        super().__post_init__()
        how, _, number = self.insert.partition(":")
        if self.insert not in ("last", "none") and (how not in ("single", "multi") or not number.isdigit()):
            raise ValueError(f"insert: last, none, or single:S or multi:S with a layer's number, not {self.insert!r}")
        if self.tail != "frozen" and self.insert == "none":
            raise ValueError(f"tail: with insert none no layer is live that {self.tail} could train in")
        if self.tail_size is not None and (self.tail not in SIZED or self.tail_size < 1):
            raise ValueError(f"tail_size: a number above 0, with tail {' or '.join(SIZED)}; tail is {self.tail}")

    def first_live(self, family: Family) -> int:
        """The number of the first live layer, with "none" of the last one, which the blend then does not enter.
        UserError for one that the backbone does not have."""
        last = family.depth(family.streams[-1]) - 1
        if self.insert in ("last", "none"):
            return last
        number = int(self.insert.partition(":")[2])
        if not 1 <= number <= last:
            raise UserError(f"insert: the blend can enter layers 1 to {last} of this backbone, not {number}")
        return number

    def streams(self, family: Family) -> tuple[str, ...]:
        """Those that are blended."""
        return family.streams[-1:] if self.insert == "none" else family.streams


@register("sherl", SherlConfig)
class Sherl(Tuner):
    """One MTSA a stream over the embedding and the kept layers; the last stream's blend replaces the input of the live
    layer, earlier streams' blends are what it attends to (methods §1.3, §1.4).

    The guide is the deepest feature before the live layer. On BERT-like encoders the T5 form is used (the released
    BERT code has a form of its own for image–text retrieval) with the embedding and all layers before the live one.
    """

    description = "SHERL: multi-tiered sensing over all layers, then the live last layer"
    lr_pooled = 2e-3
    projects = True
    text_head = True

    def __init__(self, config: SherlConfig, family: Family, tail: Tail, wants: Want) -> None:
        super().__init__(config, family, tail, wants)
        inner = checked_reduction(config.reduction, family.width)
        gate = (0.0 if wants.text_head else 0.1) if config.gate is None else config.gate
        self.names = {s: _names(config, family, s) for s in config.streams(family)}
        self.stream = family.streams[-1]
        self.features = {self.stream: rows_of(family, self.stream)}
        sets = {s: [family.width, *map(family.state_width, n)] for s, n in self.names.items()}
        for names in self.names.values():
            if family.state_width(names[-1]) != family.width:
                raise UserError(
                    f"layers: {names[-1]} would feed the live layer, but this feature space keeps it projected"
                )
        first, last = config.first_live(family), family.depth(self.stream) - 1
        if config.insert.startswith("multi"):
            # Each later layer reads what the one before read, and that one's output.
            more = {i: [family.width] * (i - first) for i in range(first + 1, last + 1)}
            sets |= {f"{self.stream}_{i}": sets[self.stream] + widths for i, widths in more.items()}
        self.mtsa = nn.ModuleDict(
            {k: MTSA(n, inner, gate, config.temperature, config.blend, config.recompute) for k, n in sets.items()}
        )
        live = range(first, last + 1) if config.insert != "none" else ()
        self.live = LiveLayers(tail, family, live, config.tail, config.tail_size)
        self.norm = nn.ModuleDict({s: family.norm(s) for s in self.names})
        self.dropout = Dropout(family.dropout)

    @classmethod
    def kept_options(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        # The papers' sizes are the default now and were not always.
        size = saved_size(state)
        return {} if size is None else {"tail_size": size}

    @classmethod
    def late_layers(cls, config: SherlConfig, family: Family) -> list[int]:
        return list(range(config.first_live(family), family.depth(family.streams[-1]) - 1))

    @classmethod
    def states(cls, config: SherlConfig, family: Family) -> list[str]:
        return [n for s in config.streams(family) for n in (*family.embedding(s), *_names(config, family, s))]

    def forward(self, batch: Batch) -> Features:
        hidden: dict[str, Tensor] = {}
        for stream, names in self.names.items():
            features = [self.tail.embed(batch, stream), *(batch.states[n] for n in names)]
            blend = self.mtsa[stream](features, features[-1])
            # The blend of the last stream enters the live layer as it is; what it attends to is normalised.
            hidden[stream] = blend if stream == self.stream else self._finish(blend, stream)
        rows = blend
        for i in self.live.layers:
            if f"{stream}_{i}" in self.mtsa:
                features.append(rows)
                rows = self.mtsa[f"{stream}_{i}"](features, rows)
            rows = self.live(i, {**hidden, stream: rows}, batch)
        return {self.stream: self._finish(rows, self.stream)}

    def _finish(self, rows: Tensor, stream: str) -> Tensor:
        norm = self.norm[stream]
        # A post-norm block has already normalised and dropped out its own output.
        return rows if isinstance(norm, nn.Identity) else self.dropout(norm(rows))


def _names(config: SherlConfig, family: Family, stream: str) -> list[str]:
    layers = config.kept(family, "sherl", stream)
    if stream == family.streams[-1]:
        first = config.first_live(family)
        layers = [i for i in layers if i < first]
        if not layers or config.insert not in ("last", "none"):
            layers = sorted({*layers, first - 1})  # the guide is what would enter the first live layer
    return [f"{stream}.{i}" for i in layers]
