"""Client side of a swarm: routes, requests, repair and spot checks. No autograd."""
