"""Mixtures of experts whose weights are one parameter of three dimensions: quantized, read and run expert by expert."""
