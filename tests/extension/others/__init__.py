"""Somebody else's package: a tuner, an objective, a backbone and a task, in a file each."""

from . import electra, margin, parity, power

__all__ = ["electra", "margin", "parity", "power"]
