"""Which objective a run has: chosen at the door by the type of the targets and by what backbone and tuner can do."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.extract.backbones.base import Family
from pipeline.extract.tasks.base import TaskSpec
from pipeline.owners import options_of, refusal
from pipeline.recipe import Recipe
from pipeline.store.errors import UserError
from pipeline.train.objectives import Answers, Objective, objective_class, objective_config, objective_names
from pipeline.train.tuners import Tuner

TARGETS = {"classification": "class", "regression": "number"}  # kind of a task → type of its targets


def objective_name(recipe: Recipe, spec: TaskSpec, family: Family, tuner: type[Tuner] | None) -> str:
    """The objective asked for, else label-text where backbone and tuner can write the label, else the first one for
    such targets. `tuner`: None for what trains inside the backbone. UserError where one cannot learn such targets."""
    target = TARGETS[spec.kind]
    fitting = [n for n in objective_names() if target in objective_class(n).targets]
    if recipe.objective:
        if recipe.objective not in fitting and objective_class(recipe.objective):
            raise UserError(
                f"--objective {recipe.objective}: the targets of {spec.name} are of type {target}; objectives for "
                f"these: {', '.join(fitting)}"
            )
        return recipe.objective
    writes = family.writes_text and (tuner is None or tuner.text_head)
    return next(n for n in fitting if objective_class(n).wants.text_head == writes)


def make_objective(
    recipe: Recipe, spec: TaskSpec, token_ids: Sequence[Sequence[int]], family: Family, tuner: type[Tuner] | None
) -> Objective:
    """The objective of a run. `token_ids`: of each target text, from the task table."""
    name = objective_name(recipe, spec, family, tuner)
    cls = objective_class(name)
    if others := recipe.objective_options.keys() - options_of("objective", name).keys():
        how = f"tuner {recipe.tuner} on {family.name} backbones" if tuner else f"{family.name} backbones"
        raise UserError(refusal(sorted(others), [f"objective {name}, that of {how} here"]))
    config = objective_config(name, recipe.objective_options)
    answers = Answers(spec.labels, spec.metrics, spec.targets, tuple(tuple(ids) for ids in token_ids), spec.values)
    return cls(config, answers)


def class_objective(family: Family, tuner: type[Tuner], token_ids: Sequence[Sequence[int]]) -> Objective:
    """An objective of `len(token_ids)` classes without names, to count and to time: the default for such a pair."""
    name = "label-text" if family.writes_text and tuner.text_head else "classification"
    cls = objective_class(name)
    return cls(cls.config_class(), Answers.of_classes(len(token_ids), token_ids))
