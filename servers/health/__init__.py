"""The swarm at a glance: who hosts what, how fast, and what nobody hosts. A page, JSON, or a table in the terminal."""
