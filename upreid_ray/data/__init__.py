"""From images on disk to uint8 batches in a reproducible order."""
