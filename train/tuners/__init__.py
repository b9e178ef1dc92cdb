"""Tuners: one file a method. Import a method's module here to register it."""

from pipeline.train.tuners import clip, conv, e3va, fixed, head2toe, lst, probe, qst, sherl, sidetuning, unipt, vse
from pipeline.train.tuners.base import (
    Start,
    StateLinear,
    Tuner,
    TunerConfig,
    fitting_tuner,
    form,
    register_tuner,
    tuner_class,
    tuner_config,
    tuner_names,
)
from pipeline.train.tuners.towers import Towers

__all__ = [
    "Start",
    "StateLinear",
    "Towers",
    "Tuner",
    "TunerConfig",
    "clip",
    "conv",
    "e3va",
    "fitting_tuner",
    "fixed",
    "form",
    "head2toe",
    "lst",
    "probe",
    "qst",
    "register_tuner",
    "sherl",
    "sidetuning",
    "tuner_class",
    "tuner_config",
    "tuner_names",
    "unipt",
    "vse",
]
