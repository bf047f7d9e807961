"""Answers, token by token: how tokens are chosen, and how they become text."""
