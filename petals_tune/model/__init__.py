"""The model on disk: checkpoints, families, downloads, conversion."""
