"""Readouts: from a tuner's rows to a loss and a prediction."""
