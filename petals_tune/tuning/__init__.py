"""Adapters on the client: PEFT's methods on local and remote blocks, and their files."""
