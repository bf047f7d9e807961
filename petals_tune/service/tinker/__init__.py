"""Tinker's interface: training and sampling by the steps of its SDK."""
