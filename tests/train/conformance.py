"""The conformance suite with what is ours alone: inputs from tests/tiny.py, and the formula of each tuner."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from pipeline import testing
from pipeline.extract.backbones import Inputs
from pipeline.testing import small_options
from tests.extract.test_backbones import inputs_of
from tests.train.formulas import FORMULAS

__all__ = ["CHECKS", "Case", "parameters_are_those_of_the_formula", "small_options"]


class Case(testing.Case):
    @cached_property
    def inputs(self) -> Inputs:
        return inputs_of(self.checkpoint, 6) if self.backbone.modality == "text" else self.images()


def parameters_are_those_of_the_formula(case: Case) -> None:
    found = sum(p.numel() for p in case.model().tuner.parameters() if p.requires_grad)
    if formula := FORMULAS.get((case.tuner, case.backbone.shape)):  # a new tuner puts its own there
        assert found == formula(case.config, case.backbone)


CHECKS: list[Callable[[Case], None]] = [*testing.CHECKS, parameters_are_those_of_the_formula]
