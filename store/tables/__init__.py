"""Task tables: the ordered samples of a task and split, and records of extractions."""
