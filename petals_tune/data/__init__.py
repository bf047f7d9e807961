"""Texts into rows, rows into batches. Knows no network and no model: a tokenizer is all it needs.

A source (`chitchat.py`, `questions.py`, `table.py` with `columns.py`) reads data, splits it and yields examples;
`rows.py` turns an example into token ids and labels; `batching.py` says which rows go together; `collate.py` pads them
into a batch; `module.py` is the Lightning shell around it all.
"""
