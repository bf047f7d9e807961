"""Devices that blocks are on: which there are, which still work, and how hidden states get from one to the next."""
