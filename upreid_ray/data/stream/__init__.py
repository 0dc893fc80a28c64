"""A set of shards -> uint8 batches in a reproducible order."""
