"""Options of our tuners, and those that objectives have in common: their configs, in modules without torch, so that the
command line lists them without loading what reads them. Those of others stand in their own files. Options of single
objectives: `train.objective_configs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pipeline.extract.options import check_options, option
from pipeline.store.errors import UserError
from pipeline.train.published import kept_layers

if TYPE_CHECKING:
    from pipeline.extract.backbones.base import Backbone

BLENDS = ("redundancy", "max", "average", "mhsa", "linear", "linear-learned", "attention")
TAILS = ("frozen", "lora", "bitfit", "adapter", "prompt")
SIZED = ("lora", "adapter", "prompt")
INITS = ("random", "magnitude", "fisher")
# The forms of pruning, and what they are called in the store. A file called "running" there was made by an older
# version, which kept rows in ascending order, not in the released one; it is no longer read.
PRUNES = {"running": "released", "aligned": "aligned"}
POOLINGS = ("mean", "first", "last")


@dataclass(frozen=True)
class TunerConfig:
    """Options common to tuners; those of a tuner are the fields of a subclass, each made by `option`, each with a
    default. Raises ValueError for a value that an option does not take. Empty `layers` are the method's own choice for
    the backbone (the papers' where they give one)."""

    layers: tuple[int, ...] = option(
        (),
        "Blocks (from 0) whose states are used. Default: the paper's choice for the backbone.",
        metavar="NUMBERS",
        extraction=True,
    )

    def __post_init__(self) -> None:
        check_options(self)

    paper: ClassVar[str] = ""  # whose choice of layers is the default, see `train.published`

    def kept(self, backbone: Backbone, stream: str) -> list[int]:
        """The layers used on `stream`, all where neither options nor a paper choose. Raises UserError for one that the
        backbone does not have."""
        depth = backbone.depth(stream)
        if not self.layers:
            return kept_layers(self.paper, backbone, stream) or list(range(depth))
        bad = [i for i in self.layers if not 0 <= i < depth]
        if bad:
            raise UserError(f"layers: the backbone's {stream} has blocks 0 to {depth - 1}, not {bad[0]}")
        return sorted(set(self.layers))


@dataclass(frozen=True)
class SideConfig(TunerConfig):
    """`reduction`: r, side width is D / r."""

    reduction: int = option(8, "Side width is the backbone's over this.", least=1)


@dataclass(frozen=True)
class ClipConfig(SideConfig):
    """`reduction`: side width is the backbone's over this. 1 is what the published counts need, though the paper says
    2. `layers`: blocks that are read beside the embedding; all by default."""

    reduction: int = option(1, "Side width is the backbone's over this.", least=1)


@dataclass(frozen=True)
class SherlClipConfig(ClipConfig):
    """`base_gate`: the pooled token of each state counts a learned share, as the released code has it on MSR-VTT."""

    base_gate: bool = option(False, "Let the pooled token of each state count a learned share (released for MSR-VTT).")


@dataclass(frozen=True)
class SherlConfig(SideConfig):
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

    paper = "sherl"

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

    def first_live(self, backbone: Backbone) -> int:
        """The number of the first live layer, with "none" of the last one, which the blend then does not enter.
        UserError for one that the backbone does not have."""
        last = backbone.depth(backbone.streams[-1]) - 1
        if self.insert in ("last", "none"):
            return last
        number = int(self.insert.partition(":")[2])
        if not 1 <= number <= last:
            raise UserError(f"insert: the blend can enter layers 1 to {last} of this backbone, not {number}")
        return number

    def streams(self, backbone: Backbone) -> tuple[str, ...]:
        """Those that are blended."""
        return backbone.streams[-1:] if self.insert == "none" else backbone.streams


@dataclass(frozen=True)
class UniptConfig(SideConfig):
    """`reduction`: r, side width is D / r. `layers`: blocks that are read; the deepest of them is the anchor."""


@dataclass(frozen=True)
class VseConfig(TunerConfig):
    """`reduction`: side width is the width of the joint space (see `Want.joint`) over this."""

    reduction: int = option(2, "Side width is the width in which slots are compared over this.", least=1)


@dataclass(frozen=True)
class SherlVseConfig(VseConfig):
    """`gate`: start of alpha, 0 the paper's. `temperature`: T of the gate."""

    blend: ClassVar[str] = "redundancy"

    gate: float = option(0.0, "Start of the gate alpha.")
    temperature: float = option(0.1, "Temperature of the gate.", above=0)


@dataclass(frozen=True)
class E3vaConfig(TunerConfig):
    """`alpha`: rank of the factors, 8 (E³VA), 16 (+) or 32 (++). `start`: e₀, "embedding" or "zero". `fusion`: "sum" is
    norm(l + e), "highway" norm(e). `zero_init`: start the last factor of each adapter at zero.

    The paper's ablations: `adapter`, `middle` and `order` of Table 5 (the plain adapter has two full matrices around
    `middle` channels; the stacked form is e + A₂(A₁(f₁) + f₂), our reading), `merging` and `norms` of Table 6."""

    alpha: int = option(8, "Rank of the adapters; 8, 16, 32 are E3VA, +, ++.", least=1)
    start: str = option("embedding", "What the highway starts from.", choices=("embedding", "zero"), extraction=True)
    fusion: str = option(
        "sum",
        "What the norms read, the sum of highway and backbone or the highway.",
        choices=("sum", "highway"),
        extraction=True,
    )
    zero_init: bool = option(True, "Start the last factor of each adapter at zero (ours) or at random.")
    adapter: str = option(
        "low-rank",
        "Adapters of two low-rank products each way, or plain ones (Table 5).",
        choices=("low-rank", "plain"),
    )
    middle: int | None = option(None, "Channels inside of a plain adapter. Default: 32.", least=1)
    order: str = option(
        "parallel", "Whether a block's second adapter sees the first (Table 5).", choices=("parallel", "stacked")
    )
    merging: str = option(
        "frozen", "Patch mergings of the highway: the backbone's, or trained from there (Table 6).",
        choices=("frozen", "trained"),
    )  # fmt: skip
    norms: str = option("trained", "Norms before the neck (Table 6).", choices=("trained", "frozen"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter == "plain" and self.alpha != 8:
            raise ValueError("alpha: the rank of low-rank adapters; a plain one has middle, its channels")
        if self.adapter != "plain" and self.middle is not None:
            raise ValueError("middle: channels inside of a plain adapter; low-rank ones have alpha, their rank")


@dataclass(frozen=True)
class Head2ToeConfig(TunerConfig):
    """`features`: share of all features that stay. `lasso`: weight of the group lasso, Σ over features of the norm of
    the head's weights on it. `select_after`: training batches before the selection."""

    features: float = option(0.1, "Share of the features that stay.", above=0, most=1)
    lasso: float = option(1e-4, "Weight of the group lasso.", least=0)
    select_after: int = option(100, "Training batches before features are selected.", least=1)


def _prune_option() -> Any:
    """`--prune`, of tuners whose blocks may start from the pruned backbone."""
    return option(
        "running",
        "How --init chooses channels: running, sublayer by sublayer as released, or aligned, one set for the residual "
        "stream (ours).",
        choices=tuple(PRUNES),
        extraction=True,
    )


@dataclass(frozen=True)
class LstConfig(SideConfig):
    """`reduction`: r, side width is D / r. `layers`: kept layers, the rest are dropped with their side blocks.
    `temperature`: of the fusion gates. `init`: what side blocks start from: "random", or the backbone pruned by
    "magnitude" or by "fisher" information on the task (LST §3.3; 0.1 and 0.2 points of GLUE average in its ablation).
    `prune`: "running" as in the released code, or "aligned", ours (see `train.sideblocks.pruning`)."""

    paper = "lst"

    reduction: int = option(
        8, "Side width is the backbone's over this. (Extraction: for the weights of --init.)", least=1, extraction=True
    )
    temperature: float = option(0.1, "Temperature of the fusion gates.", above=0)
    init: str = option(
        "random",
        "What side blocks start from: random, or the backbone pruned by magnitude or by Fisher information on the "
        "task. Extract with the same --init, --prune and --reduction.",
        choices=INITS,
        extraction=True,
    )
    prune: str = _prune_option()

    ladders: bool = option(
        True,
        "Whether states of the backbone enter the side network; without, it has the embedding alone (LST's ablation).",
    )
    distil: int = option(
        0,
        "Steps at the start in which the side network also learns to tell the backbone's last kept state: a distilled "
        "start (squared error of a linear map).",
        least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prune != "running" and self.init == "random":
            raise ValueError("--prune says how --init chooses channels; give --init magnitude or fisher with it")


@dataclass(frozen=True)
class ProbeConfig(TunerConfig):
    """`layers`: at most one block, whose output is probed; the last by default. `mlp`: width of a hidden layer with a
    residual connection before the head."""

    mlp: int | None = option(None, "Width of a hidden layer before the head. Default: none, a linear probe.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layers) > 1:
            raise ValueError(f"layers: a probe reads one layer, not {len(self.layers)}")


@dataclass(frozen=True)
class QstConfig(SideConfig):
    """`reduction`: r, side width is D / r. `layers`: kept layers. `rank`: of the way down to the side width."""

    reduction: int = option(16, "Side width is the backbone's over this.", least=1)
    rank: int = option(16, "Rank of the ways down from states to the side width.", least=1)


@dataclass(frozen=True)
class SideTuningConfig(SideConfig):
    """`reduction`: r, the side network's width is D / r. `layers`: at most one block, the frozen output; the last by
    default. `network`: "mlp", or "blocks", LST's side network without its ladders, which may start from a pruned
    backbone as there: `init`, `prune`."""

    reduction: int = option(
        8, "Side width is the backbone's over this. (Extraction: for the weights of --init.)", least=1, extraction=True
    )
    network: str = option(
        "mlp",
        "The small network: mlp, a position at a time, or blocks, narrow blocks of the backbone's own kind.",
        choices=("mlp", "blocks"),
        extraction=True,
    )
    init: str = option(
        "random",
        "What blocks start from: random, or the backbone pruned by magnitude or by Fisher information on the task. "
        "Extract with the same --init, --prune and --reduction.",
        choices=INITS,
        extraction=True,
    )
    prune: str = _prune_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prune != "running" and self.init == "random":
            raise ValueError("--prune says how --init chooses channels; give --init magnitude or fisher with it")
        if self.init != "random" and self.network != "blocks":
            raise ValueError("--init is for narrow blocks: give --network blocks with it")
        if len(self.layers) > 1:
            raise ValueError(f"layers: side-tuning blends with one layer, not {len(self.layers)}")


@dataclass(frozen=True)
class FixedConfig(TunerConfig):
    """No options of its own; `layers` are not for it: the feature pyramid is the backbone's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers:
            raise ValueError("layers: the head reads the backbone's feature pyramid; there is nothing to choose")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Options of an objective are the fields of a subclass, each made by `option`, each with a default. Raises
    ValueError for a value that an option does not take. `metric`: what is reported instead of the task's own figures;
    the first selects the best epoch."""

    metric: tuple[str, ...] = option(
        (),
        "What is scored, by names of scikit-learn or figures of the objective; the first selects the best epoch "
        "(errors: the smallest). Of two classes precision, recall and f1 are those of the second. "
        "Default: the task's own.",
        metavar="NAMES",
    )

    def __post_init__(self) -> None:
        check_options(self)

    def settled(self, labels: Sequence[str], targets: Iterable[Any]) -> Self:
        """With what it leaves to be counted counted on `targets`, those of the training rows, and the names in it
        looked up among `labels`. Raises UserError for a name that is not there."""
        return self


@dataclass(frozen=True)
class PooledConfig(ObjectiveConfig):
    """`pooling`: what the head reads of a sample's rows: their mean, the first, or the last one."""

    pooling: str = option(
        "mean", "What the head reads: the mean of the tokens, the first, or the last one.", choices=POOLINGS
    )


# Name → config, in the order in which they are registered; a test compares the two.
TUNERS: dict[str, type[TunerConfig]] = {
    "sherl-clip": SherlClipConfig,
    "unipt-clip": ClipConfig,
    "sherl": SherlConfig,
    "unipt": UniptConfig,
    "e3va": E3vaConfig,
    "head2toe": Head2ToeConfig,
    "lst": LstConfig,
    "probe": ProbeConfig,
    "qst": QstConfig,
    "side-tuning": SideTuningConfig,
    "fixed": FixedConfig,
    "sherl-vse": SherlVseConfig,
    "unipt-vse": VseConfig,
}
