"""Tuning by a request: uploaded files, jobs that run a recipe, and what is shown of runs."""
