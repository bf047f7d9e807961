"""The training loop: Lightning drives it, what is trained is injected."""
