"""A server's place among the others: which blocks it hosts, and how fast it is."""
