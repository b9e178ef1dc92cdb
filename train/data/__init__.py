"""Batches: their order, where they come from, and how they are made."""
