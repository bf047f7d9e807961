"""Routes of a client: which servers it knows, what they cost, whom it reaches and tries, and the cheapest chain."""
