"""Transformer blocks in memory: loading, quantization, adapters, the engine. Imports nothing of the network."""
