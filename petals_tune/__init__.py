"""A fine-tuning toolkit over a remote backbone: the blocks run on servers, what is trained stays with you."""
