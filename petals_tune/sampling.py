"""Generation options of a chat: the checkpoint's own, and the tokens that end an answer."""

from __future__ import annotations

import copy
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig

TEMPERATURE, TOP_P = 0.7, 0.9  # where neither the command line nor the checkpoint has its own


def generation_options(
    base: Any, tokenizer: Any, *, max_new_tokens: int, temperature: float | None, top_p: float | None
) -> GenerationConfig:
    """Return the checkpoint's own generation options with these changes, and with every end of a turn as an end.

    temperature: 0 takes the most likely token; None: the checkpoint's own, else TEMPERATURE
    top_p:       None: the checkpoint's own, else TOP_P
    """
    own = getattr(base, "generation_config", None)
    options = GenerationConfig() if own is None else copy.deepcopy(own)
    options.max_length, options.max_new_tokens = None, max_new_tokens
    options.eos_token_id = end_ids(base, tokenizer) or None
    if options.pad_token_id is None:
        options.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if temperature == 0:
        options.do_sample, options.temperature, options.top_p, options.top_k = False, None, None, None
        return options
    options.do_sample = True
    options.temperature = temperature or options.temperature or TEMPERATURE
    if top_p is not None:
        options.top_p, options.top_k = top_p, 0
    elif options.top_p is None and options.top_k is None:
        options.top_p, options.top_k = TOP_P, 0
    return options


def end_ids(base: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the checkpoint's, the tokenizer's and the chat template's."""
    found: dict[int, None] = {}
    for source in (getattr(base, "generation_config", None), getattr(base, "config", None), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found |= dict.fromkeys(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    if (end := template_end(tokenizer)) is not None:
        found[end] = None
    return list(found)


def template_end(tokenizer: Any) -> int | None:
    """Return the special token that the chat template puts after an answer; None where it puts none."""
    if not tokenizer.chat_template:
        return None
    answer = "an answer 4711"
    chat = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    try:
        _, found, after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(answer)
    except TemplateError:
        return None
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((number for text, number in special.items() if found and after.lstrip().startswith(text)), None)
