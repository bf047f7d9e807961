"""A server as a member of its swarm: its announcement, its choice of blocks, its throughput."""
