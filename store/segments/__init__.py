"""Sealed segments: writing, opening, finding and reading them."""
