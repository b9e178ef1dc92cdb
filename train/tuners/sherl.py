"""SHERL (Diao et al., ECCV 2024): blend the shallow features, then run the last backbone layer live on the blend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.capabilities import LateBlocks, LiveLast
from pipeline.extract.backbones.tail import LiveTail
from pipeline.extract.batch import Batch
from pipeline.extract.kernels.dropout import Dropout
from pipeline.train.configs import SherlConfig
from pipeline.train.features import Features, Want
from pipeline.train.learned import Learned, Mean
from pipeline.train.tuners.base import Tuner, checked_reduction, register_tuner, rows_of
from pipeline.train.tuners.livelayers import LiveLayers, saved_size
from pipeline.train.tuners.mtsa import MTSA


@register_tuner("sherl", SherlConfig)
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
    needs = (LiveLast,)
    continues_text = True
    tail: LiveTail

    def __init__(self, config: SherlConfig, backbone: Any, tail: LiveTail, wants: Want) -> None:
        super().__init__(config, backbone, tail, wants)
        inner = checked_reduction(config.reduction, backbone.width)
        gate = (0.0 if wants.text_head else 0.1) if config.gate is None else config.gate
        self.names = {s: _names(config, backbone, s) for s in config.streams(backbone)}
        self.stream = backbone.streams[-1]
        self.features = {self.stream: rows_of(backbone, self.stream)}
        sets = {s: [backbone.width, *map(backbone.state_width, n)] for s, n in self.names.items()}
        first, last = config.first_live(backbone), backbone.depth(self.stream) - 1
        if config.insert.startswith("multi"):
            # Each later layer reads what the one before read, and that one's output.
            more = {i: [backbone.width] * (i - first) for i in range(first + 1, last + 1)}
            sets |= {f"{self.stream}_{i}": sets[self.stream] + widths for i, widths in more.items()}
        self.mtsa = nn.ModuleDict(
            {k: MTSA(n, inner, gate, config.temperature, config.blend, config.recompute) for k, n in sets.items()}
        )
        live = range(first, last + 1) if config.insert != "none" else ()
        self.live = LiveLayers(tail, backbone, live, config.tail, config.tail_size)
        self.norm = nn.ModuleDict({s: backbone.norm(s) for s in self.names})
        # T5 drops out behind its final norms; no other backbone does.
        self.dropout = Dropout(getattr(backbone.config, "dropout_rate", 0.0))

    @classmethod
    def refuse(cls, config: SherlConfig, backbone: Backbone) -> str | None:
        if cls.late_layers(config, backbone) and not isinstance(backbone, LateBlocks):
            return f"insert: {config.insert} needs {LateBlocks.what}, which {backbone.name} backbones do not have"
        for stream in config.streams(backbone):
            guide = _names(config, backbone, stream)[-1]
            if backbone.state_width(guide) != backbone.width:
                return f"layers: {guide} would feed the live layer, but this feature space keeps it projected"
        return super().refuse(config, backbone)

    @classmethod
    def kept_options(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        # The papers' sizes are the default now and were not always.
        size = saved_size(state)
        return {} if size is None else {"tail_size": size}

    @classmethod
    def late_layers(cls, config: SherlConfig, backbone: Backbone) -> list[int]:
        return list(range(config.first_live(backbone), backbone.depth(backbone.streams[-1]) - 1))

    @classmethod
    def states(cls, config: SherlConfig, backbone: Backbone) -> list[str]:
        return [n for s in config.streams(backbone) for n in (*backbone.embedding(s), *_names(config, backbone, s))]

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

    def insights(self, batches: Iterable[Batch]) -> list[Learned]:
        mean, order = Mean(), {s: [f"{s}: embedding", *names[:-1]] for s, names in self.names.items()}

        def note(stream: str, mtsa: Any, given: tuple[Any, ...]) -> None:
            weights, alike = mtsa.shown(given[0])
            mean.add(f"alike {stream}", alike)
            if weights is not None:
                mean.add(f"weights {stream}", weights)

        seen = [self.mtsa[s].register_forward_pre_hook(partial(note, s)) for s in order]
        try:
            for batch in batches:
                self(batch)
        finally:
            for handle in seen:
                handle.remove()
        found = []
        for stream, names in order.items():
            if f"weights {stream}" in mean.total:
                about = "The weight of each layer in the blend (SHERL eq. 3), mean over positions."
                found.append(Learned(f"Layer attention, {stream}", about, names, mean.of(f"weights {stream}")))
            about = "Rectified cosine of the layers' refined features, mean over positions; rows sum to the redundancy."
            found.append(Learned(f"Redundancy, {stream}", about, names, mean.of(f"alike {stream}")))
        return found

    around_what = "before: the blend that enters the live layer; after: what leaves it (SHERL Fig. 8)"

    def around(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if not self.live.layers:
            return super().around(batch)
        entering: list[Tensor] = []
        note = self.live.register_forward_pre_hook(lambda _, given: entering.append(given[1][self.stream]))
        try:
            after = self.feature_means(self(batch), batch)
        finally:
            note.remove()
        return batch.layout(self.stream).mean(entering[0]), after

    def _finish(self, rows: Tensor, stream: str) -> Tensor:
        norm = self.norm[stream]
        # A post-norm block has already normalised and dropped out its own output.
        return rows if isinstance(norm, nn.Identity) else self.dropout(norm(rows))


def _names(config: SherlConfig, backbone: Backbone, stream: str) -> list[str]:
    layers = config.kept(backbone, stream)
    if stream == backbone.streams[-1]:
        first = config.first_live(backbone)
        layers = [i for i in layers if i < first]
        if not layers or config.insert not in ("last", "none"):
            layers = sorted({*layers, first - 1})  # the guide is what would enter the first live layer
    return [f"{stream}.{i}" for i in layers]
