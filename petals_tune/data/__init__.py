"""Data: examples from a source, rows of token ids, padded batches. Needs a tokenizer, no network and no model.

A source (`chitchat.py`, `questions.py`, `table.py` with `columns.py`) reads a corpus, splits it and yields examples;
`rows.py` turns an example into token ids and labels; `batching.py` packs rows and orders them; `collate.py` pads them
into a batch; `module.py` is the LightningDataModule.
"""
