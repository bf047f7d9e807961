"""Hosts blocks of a model for others. Nothing in petals_tune imports this package."""
