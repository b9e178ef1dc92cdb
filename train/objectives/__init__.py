"""Objectives: one file a kind of target, with its head. Import an objective's module here to register it."""

from pipeline.train.objectives import (
    classification,
    completion,
    contrastive,
    detection,
    hinge,
    label_text,
    multilabel,
    regression,
    segmentation,
    tagging,
)
from pipeline.train.objectives.base import (
    Answers,
    Head,
    Objective,
    ObjectiveConfig,
    Report,
    Scorer,
    objective_class,
    objective_config,
    objective_names,
    register_objective,
)

__all__ = [
    "Answers",
    "Head",
    "Objective",
    "ObjectiveConfig",
    "Report",
    "Scorer",
    "classification",
    "completion",
    "contrastive",
    "detection",
    "hinge",
    "label_text",
    "multilabel",
    "objective_class",
    "objective_config",
    "objective_names",
    "register_objective",
    "regression",
    "segmentation",
    "tagging",
]
