"""A service on 127.0.0.1: clients of other interfaces use a swarm through it."""
