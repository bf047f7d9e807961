"""Texts into rows, rows into batches. Knows no network and no model: a tokenizer is all it needs.

A source (`chitchat.py`, `reviews.py`) reads one corpus, splits it and yields examples; `rows.py` turns an example into
token ids and labels; `collate.py` pads rows into a batch; `module.py` is the Lightning shell around the three.
"""
