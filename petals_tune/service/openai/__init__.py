"""OpenAI's interface: its paths, its bodies and its errors."""
