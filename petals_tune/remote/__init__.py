"""Where a Hugging Face model meets the swarm: its block list is replaced by one that runs elsewhere."""
