"""Transformer blocks in memory: loading, quantization, adapters, the engine. Knows no network."""
