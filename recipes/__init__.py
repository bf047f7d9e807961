"""Whole runs, as YAML: one file a recipe. A package, so that an installed wheel carries them."""
