"""Adapters as an argument of a call: one model on one connection, many adapters, several threads."""
