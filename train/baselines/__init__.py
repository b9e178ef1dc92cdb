"""Live baselines: methods that train inside the backbone, beside the tuners in tables."""
