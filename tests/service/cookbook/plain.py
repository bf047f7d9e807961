"""Losses of plain transformers and PEFT, for the figures that recipes log."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset

from tests.service.cookbook.chatml import chatml


def logprobs(net: Any, tokenizer: Any, question: str, answer: str) -> torch.Tensor:
    """Log-probabilities of the tokens of an answer, the end of its turn among them."""
    prompt = tokenizer(chatml([{"role": "user", "content": question}], reply=True)).input_ids
    ids = torch.tensor([prompt + tokenizer(f"{answer}<|im_end|>").input_ids])
    found = net(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).flatten()
    return found[len(prompt) - 1 :]


def talk_loss(net: Any, tokenizer: Any, rows: Dataset) -> float:
    """The mean over talks of the mean loss of a token of the answer."""
    with torch.no_grad():
        losses = [-logprobs(net, tokenizer, talk[0]["content"], talk[1]["content"]).mean() for talk in rows["messages"]]
    return torch.stack(losses).mean().item()
