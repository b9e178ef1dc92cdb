"""Training: streams of batches, tuners, heads, and the loop. Reads stores and live backbones alike."""
