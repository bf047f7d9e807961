"""Training runs of the Tinker interface: the order of their requests, their memory, and what they compute."""
