"""Speculative decoding: several guessed tokens go through the servers in one step, and the right ones are kept."""
