"""Which objective a run has: chosen at the door by the type of the targets and by what backbone and tuner can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.tasks.base import TaskSpec
from pipeline.owners import options_of, refusal
from pipeline.recipe import Recipe
from pipeline.store.errors import UserError
from pipeline.train.objectives import Answers, Objective, objective_class, objective_config, objective_names
from pipeline.train.tuners import Tuner, tuner_class, tuner_names


def target_types(recipe: Recipe) -> tuple[str, ...]:
    """The types of target that the recipe's objective learns; () where it names none."""
    return objective_class(recipe.objective).targets if recipe.objective else ()


def refuse_targets(recipe: Recipe, spec: TaskSpec) -> None:
    """UserError where the recipe's objective does not learn targets of the task's type."""
    learned = target_types(recipe)
    if learned and spec.target not in learned:
        fitting = [n for n in objective_names() if spec.target in objective_class(n).targets]
        raise UserError(
            f"--objective {recipe.objective}: the targets of {spec.name} are of type {spec.target}; objectives for "
            f"these: {', '.join(fitting) or 'none'}"
        )


def refuse_untargeted(spec: TaskSpec) -> None:
    """UserError where the task has no targets."""
    if spec.target == "none":
        raise UserError(
            f"the rows of {spec.name} have no targets to learn: extract with --label COLUMN, or read their states with "
            "pipeline.stream"
        )


def answers_in_text(objective: str | None, spec: TaskSpec, backbone: Backbone) -> bool:
    """Whether the rows of a task are extracted with texts that answer them: always by a backbone that writes text; by
    one that goes on with texts where `objective` says so."""
    if not backbone.continues_text:
        return backbone.writes_text
    cls = objective_class(objective) if objective else None
    return cls is not None and cls.wants.text_head and not cls.continues_text and spec.target in cls.targets


def answers_of(spec: TaskSpec, backbone: Backbone) -> tuple[str, ...]:
    """What the rows are answered with: a text-to-text backbone has the task's own texts, one that goes on with a text
    the names of the classes. UserError for numbers, whose texts begin alike."""
    if not backbone.continues_text:
        return spec.texts
    if spec.target != "class":
        raise UserError(
            f"--objective label-text: {backbone.name} backbones answer with names of classes, not with numbers: "
            "--objective regression"
        )
    return spec.labels


def objective_name(
    recipe: Recipe, spec: TaskSpec, backbone: Backbone, tuner: type[Tuner] | None, answered: bool = False
) -> str:
    """The objective asked for, else the first one for such targets that takes the options given; where backbone and
    tuner write text, a class or a number is written as one. `tuner`: None for what trains inside the backbone.
    `answered`: the rows were extracted with their answers. UserError where none can learn such targets here, or there
    are none."""
    target = spec.target
    fitting = [n for n in objective_names() if target in objective_class(n).targets]
    refuse_untargeted(spec)
    refuse_targets(recipe, spec)
    written = [n for n in fitting if objective_class(n).wants.text_head]
    if backbone.continues_text and spec.target != "tokens":
        if recipe.objective in written and not answered:
            raise UserError(
                f"the rows of {spec.name} were extracted without answers: extract with --objective label-text"
            )
        if answered and recipe.objective not in (None, *written):
            raise UserError(
                f"--objective {recipe.objective}: the training rows of {spec.name} were extracted with their answers, "
                "which it would see; extract without --objective label-text"
            )
    in_text = answered or spec.target == "tokens" or not backbone.continues_text
    text = next((n for n in written if in_text and _writes(objective_class(n), backbone, tuner)), None)
    plain = [n for n in fitting if n not in written]
    if not text and ((answered and backbone.continues_text) or not plain):
        able = ", ".join(n for n in tuner_names(type(backbone)) if tuner_class(n, backbone).continues_text)
        here = f"{backbone.name} backbones do not"
        if tuner and backbone.continues_text:
            here = f"tuner {tuner.name} does not; those that do: {able}"
        what = "answered with text" if answered else "tokens of its texts, which are gone on with"
        raise UserError(f"the targets of {spec.name} are {what}: {here}")
    return text or recipe.objective or _taking(plain, recipe.objective_options)


def _taking(names: Sequence[str], options: Mapping[str, Any]) -> str:
    """The first of the objectives `names` that takes the options, as --head may say which one is meant; else the
    first, which says what is wrong with them."""
    for name in names:
        try:
            objective_config(name, options)
        except UserError:
            continue
        return name
    return names[0]


def _writes(objective: type[Objective], backbone: Backbone, tuner: type[Tuner] | None) -> bool:
    """Whether backbone and tuner have what the head of `objective` reads, rows for a language-model head."""
    if objective.continues_text or backbone.continues_text:
        return backbone.continues_text and (tuner is None or tuner.continues_text)
    return backbone.writes_text and (tuner is None or tuner.text_head)


def make_objective(
    recipe: Recipe,
    spec: TaskSpec,
    token_ids: Sequence[Sequence[int]],
    backbone: Backbone,
    tuner: type[Tuner] | None,
    training: Sequence[Any] = (),
) -> Objective:
    """The objective of a run. `token_ids`: of each target text, from the task table; `training`: the targets of its
    training rows, on which options may be counted."""
    how = f"tuner {recipe.tuner} on {backbone.name} backbones" if tuner else f"{backbone.name} backbones"
    name = objective_name(recipe, spec, backbone, tuner, bool(token_ids))
    return _made(recipe, spec, token_ids, name, how, training, backbone)


def joint_objective(recipe: Recipe, spec: TaskSpec, slots: Sequence[str], training: Sequence[Any] = ()) -> Objective:
    """The objective of a run with several backbones: the one asked for, else the first for such targets, whose head
    reads features of the `slots`. `training`: as in `make_objective`. UserError where there is none."""
    refuse_untargeted(spec)
    refuse_targets(recipe, spec)
    fitting = [n for n in objective_names() if spec.target in objective_class(n).targets and objective_class(n).slots]
    if (recipe.objective and recipe.objective not in fitting) or not fitting:
        asked = f"--objective {recipe.objective}" if recipe.objective else f"targets of type {spec.target}"
        there = ", ".join(n for n in objective_names() if objective_class(n).slots)
        raise UserError(f"{asked}: not for several backbones; objectives that are: {there}")
    return _made(recipe, spec, (), recipe.objective or fitting[0], "several backbones", training, slots=slots)


def _made(
    recipe: Recipe,
    spec: TaskSpec,
    token_ids: Sequence[Sequence[int]],
    name: str,
    how: str,
    training: Sequence[Any],
    backbone: Backbone | None = None,
    slots: Sequence[str] = (),
) -> Objective:
    cls = objective_class(name)
    if others := recipe.objective_options.keys() - options_of("objective", name).keys():
        raise UserError(refusal(sorted(others), [f"objective {name}, that of {how} here"]))
    config = objective_config(name, recipe.objective_options).settled(spec.labels, training)
    ids = tuple(tuple(each) for each in token_ids)
    continued = backbone is not None and backbone.continues_text and bool(ids)
    texts = answers_of(spec, backbone) if continued and backbone else spec.texts
    return cls(config, Answers(spec.labels, spec.metrics, texts, ids, spec.values, continued, tuple(slots)))


def plain_objective(spec: TaskSpec) -> Objective:
    """What makes tensors of the task's targets, whatever reads them."""
    fitting = (objective_class(n) for n in objective_names() if spec.target in objective_class(n).targets)
    cls = min(fitting, key=lambda found: found.wants.text_head)
    return cls(cls.config_class(), Answers(spec.labels, spec.metrics))


def class_objective(backbone: Backbone, tuner: type[Tuner], token_ids: Sequence[Sequence[int]]) -> Objective:
    """An objective of `len(token_ids)` classes without names, to count and to time: the default for such a pair; of no
    class, the tokens of the text."""
    if not token_ids:
        completion = objective_class("completion")
        return completion(completion.config_class(), Answers())
    name = "label-text" if backbone.writes_text and tuner.text_head else "classification"
    cls = objective_class(name)
    return cls(cls.config_class(), Answers.of_classes(len(token_ids), token_ids))
