"""Building blocks of a run, as YAML. Hydra reads them as pkg://petals_tune.conf, which needs a package."""
