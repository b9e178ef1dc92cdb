"""Code that only makes a CPU faster, and could be deleted."""
