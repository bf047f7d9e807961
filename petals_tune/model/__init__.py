"""The model on disk: checkpoints, downloads, conversion, and how to split a model into blocks."""
