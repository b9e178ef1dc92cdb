"""Ladder side-tuning (Sung et al., NeurIPS 2022): a narrow copy of the backbone fed from its hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.tail import Tail
from pipeline.extract.batch import Batch
from pipeline.extract.kernels.bylength import by_length
from pipeline.train.configs import PRUNES, LstConfig, SideTuningConfig
from pipeline.train.features import Features, Want
from pipeline.train.learned import Learned
from pipeline.train.sideblocks import prunable, pruned, side_stack
from pipeline.train.tuners.base import Start, Tuner, checked_reduction, linear, register_tuner, rows_of


class Ladder(nn.Module):
    """One stream's side network: s ← Lin₀(embedding), then for each kept layer i, s ← μᵢ s + (1 − μᵢ) Linᵢ(hᵢ) and a
    side block (LST eq. 1; fuse first, then block). μ = sigmoid(alpha / T), alpha starts at 0.

    There is a gate for every backbone layer, also for dropped ones, as in the official parameter counts. `down(n, d)`:
    a map of states, from width n to d; `gate`: what alpha starts at. `ladders`: False leaves the states and their gates
    out, so that the side network has the embedding alone.
    """

    def __init__(
        self,
        backbone: Backbone,
        stream: str,
        layers: list[int],
        reduction: int,
        temperature: float,
        gate: float = 0.0,
        down: Callable[[int, int], nn.Module] = linear,
        ladders: bool = True,
    ) -> None:
        super().__init__()
        inner = checked_reduction(reduction, backbone.width)
        self.stream, self.temperature, self.layers = stream, temperature, layers
        self.first = down(backbone.width, inner)
        self.down = nn.ModuleList(down(backbone.state_width(f"{stream}.{i}"), inner) for i in layers if ladders)
        self.gates = nn.Parameter(torch.full((backbone.depth(stream),), gate)) if ladders else None
        self.side = side_stack(backbone, stream, layers, reduction)

    def rungs(self, batch: Batch, embedding: Tensor) -> Tensor:
        """(rows, D) embedding and the kept states → (rows, 1 + layers, D / r). `Tail.embed` has dropped out the
        embedding, once as in the released code."""
        rows = self.first(embedding)
        states = (batch.states[f"{self.stream}.{i}"] for i in self.layers if self.gates is not None)
        return torch.stack([rows, *(down(h) for down, h in zip(self.down, states, strict=True))], dim=1)

    def forward(self, rungs: Tensor, batch: Batch, memory: Tensor | None = None) -> Tensor:
        """(rows, 1 + layers, D / r) → (rows, D / r), normalised. `memory`: the stream before, if any, (rows, D / r)."""
        layout, context = batch.layout(self.stream), self.side.context(batch, self.stream, memory)
        mu = None if self.gates is None else torch.sigmoid(self.gates / self.temperature)
        rows, *steps = rungs.unbind(1)
        for k, i in enumerate(self.layers):
            if mu is not None:
                rows = mu[i] * rows + (1 - mu[i]) * steps[k]
            rows = layout.unpad(self.side.block(k, layout.pad(rows), context))
        return self.side.final(rows)


def pruned_start(config: LstConfig | SideTuningConfig, backbone: Backbone) -> Start | None:
    """First weights of narrow blocks, cut from the backbone's own (LST §3.3); None for random ones."""
    if config.init == "random":
        return None

    def make(model: Any, importance: dict[str, Tensor]) -> dict[str, Tensor]:
        return pruned(backbone, model, importance, config.reduction, config.prune == "aligned")

    return Start(f"lst-{config.init}-{PRUNES[config.prune]}-r{config.reduction}", config.init == "fisher", make)


def unprunable(config: LstConfig | SideTuningConfig, backbone: Backbone) -> str | None:
    """Why `config.init` cannot be had of `backbone`, in one sentence; None where it can."""
    if config.init != "random" and not prunable(backbone):
        return f"init: {backbone.name} backbones have no pruning yet; use random"
    if config.init == "fisher" and not backbone.writes_text:
        return (
            f"init: fisher needs the gradient of a pretrained output on the task, and {backbone.name} backbones "
            "come without a head; use --init magnitude"
        )
    return None


@register_tuner("lst", LstConfig)
class Lst(Tuner):
    """A ladder a stream. Under a frozen text head a last map goes up to D; a trainable head reads the side width
    (methods §2.1)."""

    description = "LST: ladder side network, a narrow transformer fed from every kept layer"
    projects = True
    text_head = True
    continues_text = True

    def __init__(self, config: LstConfig, backbone: Backbone, tail: Tail, wants: Want) -> None:
        super().__init__(config, backbone, tail, wants)
        self.ladders = nn.ModuleDict(
            {
                s: Ladder(
                    backbone, s, config.kept(backbone, s), config.reduction, config.temperature, ladders=config.ladders
                )
                for s in backbone.streams
            }
        )
        self.stream = backbone.streams[-1]
        inner = backbone.width // config.reduction
        self.up = linear(inner, backbone.width) if wants.text_head else None
        width = inner if self.up is None else backbone.width
        self.features = {self.stream: rows_of(backbone, self.stream, width)}
        # Which state a distilled start tells, and how: by the way up where there is one.
        self.told = f"{self.stream}.{config.kept(backbone, self.stream)[-1]}"
        self.teller = linear(inner, backbone.state_width(self.told)) if config.distil and self.up is None else None
        self.distilling = False
        self.distance: Tensor | None = None

    @classmethod
    def states(cls, config: LstConfig, backbone: Backbone) -> list[str]:
        names = []
        for s in backbone.streams:
            kept = [f"{s}.{i}" for i in config.kept(backbone, s)]
            told = kept[-1:] if config.distil and s == backbone.streams[-1] else []
            names += [*backbone.embedding(s), *(kept if config.ladders else told)]
        return names

    @classmethod
    def refuse(cls, config: LstConfig, backbone: Backbone) -> str | None:
        return unprunable(config, backbone) or super().refuse(config, backbone)

    @classmethod
    def start(cls, config: LstConfig, backbone: Backbone) -> Start | None:
        return pruned_start(config, backbone)

    def begin(self, weights: dict[str, Tensor]) -> None:
        for stream, ladder in self._ladders():
            own = {k.removeprefix(f"{stream}."): v for k, v in weights.items() if k.startswith(f"{stream}.")}
            ladder.side.begin(own, ladder.layers)

    def forward(self, batch: Batch) -> Features:
        rows: Tensor | None = None
        for stream, ladder in self._ladders():
            rungs = ladder.rungs(batch, self.tail.embed(batch, stream))
            # A later stream reads all of the one before, and is short.
            rows = by_length(batch, stream, rungs, ladder) if rows is None else ladder(rungs, batch, rows)
        assert rows is not None
        if self.distilling and self.training:
            told = rows if self.teller is None and self.up is None else (self.teller or self.up)(rows)  # type: ignore[misc]
            self.distance = nn.functional.mse_loss(told, batch.states[self.told].float())
        return {self.stream: rows if self.up is None else self.up(rows)}

    @classmethod
    def needs_one_head(cls, config: Any) -> str:
        what = "choose one backbone and one task, or leave --distil out"
        return f"a distilled start adds to the loss of one head: {what}" if config.distil else ""

    def begin_step(self, step: int, steps: int) -> None:
        self.distilling = step < self.config.distil

    def penalty(self, head: nn.Module) -> Tensor | None:
        """Of a distilled start."""
        found, self.distance = self.distance, None
        return found

    def insights(self, batches: Iterable[Batch]) -> list[Learned]:
        found = []
        for stream, ladder in self._ladders():
            if ladder.gates is None:
                continue
            entering = 1 - torch.sigmoid(ladder.gates.detach() / ladder.temperature)[ladder.layers]
            about = "1 − μ: how much of each layer's state enters the ladder, beside what came up it; 0.5 at the start."
            names = [f"{stream}.{i}" for i in ladder.layers]
            found.append(Learned(f"Gates of the {stream}'s ladder", about, names, entering.cpu()))
        return found

    def _ladders(self) -> Iterator[tuple[str, Ladder]]:
        return ((s, cast(Ladder, ladder)) for s, ladder in self.ladders.items())
