"""Scheduling of computation: the fair queue, batches of generation steps, the compute thread."""
