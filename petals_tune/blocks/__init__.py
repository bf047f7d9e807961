"""Transformer blocks in memory: loading, quantization, adapters, the engine. No network."""
