"""Options of our objectives beyond the common ones of `train.configs`; without torch, as those."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from pipeline.extract.options import option
from pipeline.store.errors import UserError
from pipeline.train.box_configs import DetectionConfig, InstancesConfig
from pipeline.train.configs import ObjectiveConfig, PooledConfig

BALANCED = ("balanced",)
FEW_PAIRS = 20_000
RANKED_POOLINGS = ("mean", "first", "last", "max", "gpo")


@dataclass(frozen=True)
class ClassificationConfig(PooledConfig):
    """`class_weights`: what a row of each class counts in the loss, the mean of which is over the sum of the weights;
    classes that are not named count 1. "balanced": rows / (classes · rows of the class), as in scikit-learn, over the
    classes that occur."""

    class_weights: tuple[str, ...] = option(
        (),
        "What rows of a class count in the loss: balanced (classes count alike, counted on the training rows), or "
        "NAME=WEIGHT,…; classes not named count 1. Default: rows count alike.",
        metavar="balanced|NAME=W,…",
    )

    def settled(self, labels: Sequence[str], targets: Iterable[Any]) -> Self:
        if self.class_weights == BALANCED:
            rows = Counter(target for target in targets if target is not None)
            share = sum(rows.values()) / max(1, len(rows))
            weights = [share / rows[i] if rows[i] else 1.0 for i in range(len(labels))]
        else:
            weights = named_weights("class_weights", self.class_weights, labels)
        return replace(self, class_weights=weights_text(labels, weights))


@dataclass(frozen=True)
class MultilabelConfig(PooledConfig):
    """`threshold`: the probability from which a label is told. `positive_weights`: what a row with a label counts in
    that label's loss beside one without; "balanced": rows without / rows with it, 1 for a label that all or none have.
    The mean stays one over rows and labels, as that of torch."""

    threshold: float = option(0.5, "Probability from which a label is told.", above=0, below=1)
    positive_weights: tuple[str, ...] = option(
        (),
        "What a row with a label counts in its loss beside one without: balanced (rows without / rows with it, counted "
        "on the training rows), or NAME=WEIGHT,…; labels not named count 1. Default: alike.",
        metavar="balanced|NAME=W,…",
    )

    def settled(self, labels: Sequence[str], targets: Iterable[Any]) -> Self:
        if self.positive_weights == BALANCED:
            known = [target for target in targets if target is not None]
            rows = Counter(label for target in known for label in set(target))
            weights = [(len(known) / rows[i] - 1) or 1.0 if rows[i] else 1.0 for i in range(len(labels))]
        else:
            weights = named_weights("positive_weights", self.positive_weights, labels)
        return replace(self, positive_weights=weights_text(labels, weights))


def named_weights(option: str, given: Sequence[str], labels: Sequence[str]) -> list[float]:
    """Weights in the order of `labels` from texts NAME=WEIGHT, 1 for what is not named; [] where nothing is `given`.
    Raises UserError for another text, an unknown name, one that is named twice, or a weight that is not above 0."""
    weights: dict[str, float] = {}
    spelled = "--" + option.replace("_", "-")
    for text in given:
        name, _, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not name or not 0 < weight < float("inf"):
            raise UserError(f"{spelled}: balanced, or NAME=WEIGHT with a weight above 0, not {text!r}")
        if name not in labels:
            raise UserError(f"{spelled}: there is no class {name!r}; there are: {', '.join(labels)}")
        if name in weights:
            raise UserError(f"{spelled}: {name!r} is given twice")
        weights[name] = weight
    return [weights.get(label, 1.0) for label in labels] if weights else []


def weights_text(labels: Sequence[str], weights: Sequence[float]) -> tuple[str, ...]:
    """`weights`, if any, as the texts that `named_weights` reads, to the last bit."""
    return tuple(f"{label}={weight!r}" for label, weight in zip(labels, weights, strict=False))


@dataclass(frozen=True)
class SegmentationConfig(ObjectiveConfig):
    """`head`: "upernet" (Xiao et al. 2018) on all maps, "fcn" (Long et al. 2015) on the last but one, "linear" on all.
    `head_width`: channels inside of it. `auxiliary_weight`: of the loss of an FCN head on the last map but one, which
    is there in training alone; 0 leaves it out. `head_dropout`: before the classifier. `ignore_index`: a number in
    masks that is no class, beside 255. None is the published value of the head: width 512 of UPerNet, 256 of FCN, 0.4
    and 0.1."""

    head: str = option("upernet", "What reads the feature maps.", choices=("upernet", "fcn", "linear"))
    head_width: int | None = option(None, "Channels of the head. Default: 512 of upernet, 256 of fcn.", least=1)
    auxiliary_weight: float | None = option(
        None, "Weight of the loss of UPerNet's auxiliary head; 0: there is none. Default: 0.4.", least=0
    )
    head_dropout: float | None = option(None, "Dropout before the classifier. Default: 0.1.", least=0, below=1)
    ignore_index: int | None = option(
        None,
        "Number in masks that is no class, beside 255. Default: 11 of CamVid's own masks.",
        least=0,
        most=255,
        extraction=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head != "upernet" and self.auxiliary_weight is not None:
            raise ValueError(f"auxiliary_weight: upernet has an auxiliary head, {self.head} has none")
        for name in ("head_width", "head_dropout"):
            if self.head == "linear" and getattr(self, name) is not None:
                raise ValueError(f"{name}: a linear head is a single linear map, it has none")

    @property
    def width(self) -> int:
        """Channels of the head."""
        return self.head_width or {"upernet": 512}.get(self.head, 256)

    @property
    def dropout(self) -> float:
        """Before the classifier."""
        return 0.1 if self.head_dropout is None else self.head_dropout

    @property
    def auxiliary(self) -> float:
        """The weight of the auxiliary loss, 0 for none."""
        return 0.0 if self.head != "upernet" else 0.4 if self.auxiliary_weight is None else self.auxiliary_weight


@dataclass(frozen=True)
class RetrievalConfig(ObjectiveConfig):
    """`joint_width`: D, of the space in which two slots are compared. `pooling`: what stands for a sample's positions
    there; "gpo" is VSE∞'s (see `train.objectives.gpo`). `cells`: feature maps of images are
    brought to cells of so many times so many positions. `drop_cells`: share of the positions of an image's map that is
    left out in training. `eval_folds`: figures are told as means over so many parts of the split, too."""

    joint_width: int = option(1024, "Width of the space in which the slots are compared.", least=1)
    pooling: str = option(
        "mean",
        "What stands for a sample's positions: their mean, the first, the last, the largest value of each channel, or "
        "generalised pooling (gpo, VSE∞'s).",
        choices=RANKED_POOLINGS,
    )
    cells: int = option(
        1, "Bring images' feature maps to cells of so many times so many positions first (SHERL's VSE∞: 2).", least=1
    )
    drop_cells: float = option(
        0.0,
        "Share of the positions of images' feature maps that is left out in training (VSE∞: 0.2).",
        least=0,
        below=1,
    )
    eval_folds: int = option(1, "Also tell figures as means over so many parts of the split (COCO's 1K: 5).", least=1)


@dataclass(frozen=True)
class HingeConfig(RetrievalConfig):
    """`margin`: by which what belongs together is to be more similar. `negatives`: "all" in every epoch, or "hardest":
    the hardest of each pair, at first with a growing weight, after `all_negatives_epochs`. None: all where there are
    fewer than 20,000 training pairs, which the hardest ones overfit (tests/benchmarks/RESULTS.md), else as VSE∞."""

    margin: float = option(0.2, "By how much more similar than others pairs are to be.", above=0)
    negatives: str | None = option(
        None,
        "Which negatives count: all, or the hardest of each pair (VSE∞, after its first epoch). Default: all below "
        "20,000 training pairs, else the hardest.",
        choices=("all", "hardest"),
    )
    all_negatives_epochs: int = option(1, "With the hardest negatives: first epochs in which all count.", least=0)

    def settled(self, labels: Sequence[str], targets: Iterable[Any]) -> Self:
        few = sum(1 for _ in targets) < FEW_PAIRS
        return replace(self, negatives=self.negatives or ("all" if few else "hardest"))


@dataclass(frozen=True)
class ContrastiveConfig(RetrievalConfig):
    """`logit_scale`: similarities are multiplied by it, at first or for good: 1 / 0.07 as CLIP starts, 100 as CLIP ends
    and CLIP4Clip keeps. `learn_scale`: it is trained; it is at most 100."""

    logit_scale: float = option(
        14.285714285714286,
        "Similarities are multiplied by it, 100 at most; CLIP starts at 1 / 0.07.",
        above=0,
        most=100,
    )
    learn_scale: bool = option(True, "Train that scale, from its value on.")


# Name → config, by name; a test compares them with the registered ones.
OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "classification": ClassificationConfig,
    "completion": ObjectiveConfig,
    "contrastive": ContrastiveConfig,
    "detection": DetectionConfig,
    "hinge": HingeConfig,
    "instances": InstancesConfig,
    "label-text": ObjectiveConfig,
    "multilabel": MultilabelConfig,
    "regression": PooledConfig,
    "segmentation": SegmentationConfig,
    "tagging": ObjectiveConfig,
}
