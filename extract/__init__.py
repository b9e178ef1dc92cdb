"""Extraction: tasks, backbones, the identity of a feature space, and the run that fills a store."""
