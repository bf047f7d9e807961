"""Hugging Face models whose blocks run on a swarm: loading, autograd and generation."""
