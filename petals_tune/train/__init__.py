"""Training with Lightning: module, objectives, callbacks, a whole run, and sweeps."""
