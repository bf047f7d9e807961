"""Read-only swarm monitor: who hosts which blocks, how fast, and which are missing. A page, JSON, or a table."""
