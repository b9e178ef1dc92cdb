"""A recipe with everything it names looked up: space, tables, tuner, sources."""
