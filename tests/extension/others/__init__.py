"""Somebody else's package: a tuner, an objective, a backbone and a task, in a file each."""

from . import distil, margin, parity, power

__all__ = ["distil", "margin", "parity", "power"]
