"""Encoding: an example becomes rows of token ids, and of labels that are -100 where a token is not supervised.

The answer and its end are supervised, the context is not (petals_tune.data.chat_rows). Of a plain text all tokens are
supervised but the first of each row, which nothing precedes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from petals_tune.data.chat_format import ChatFormat
from petals_tune.data.chat_rows import IGNORED, Row, chat_rows
from petals_tune.data.examples import AnyExample, Chat, Example, LabelledText, Message, Text
from petals_tune.data.tokens import encode, end_ids, word_id

__all__ = ["IGNORED", "Row", "context_ids", "rows_of", "word_id"]


def rows_of(example: AnyExample, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Row]:
    """Encode an example: its context, then the answer and the end of its turn.

    A long context loses its oldest turns, but not the system message, the last turn or any of the answer; where the row
    is longer than `max_tokens` even then, there is none. A long text becomes several rows, and so does a chat whose
    answers cannot all stand in one row as generation would give them.
    Raises DataError when the answer is empty, when a label word is not one token, or when the chat template refuses
    the messages.
    """
    match example:
        case Text():
            return list(_text_rows(example, tokenizer, max_tokens))
        case LabelledText(prompt=prompt, word=word):
            ids, label = encode(prompt, tokenizer, begin=True), word_id(word, tokenizer)
            row = Row(input_ids=[*ids, label], labels=[IGNORED] * len(ids) + [label])
            return [row] if len(row.input_ids) <= max_tokens else []
        case Chat():
            return chat_rows(example, tokenizer, max_tokens, from_user=False)
        case Example(context=context, answer=answer, every_answer=every_answer):
            messages = (*context, {"role": "assistant", "content": answer})
            learned = tuple(
                position
                for position, turn in enumerate(messages)
                if turn["role"] == "assistant" and (every_answer or position == len(context))
            )
            return chat_rows(Chat(messages=messages, learned=learned), tokenizer, max_tokens, from_user=True)


def _text_rows(example: Text, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Iterator[Row]:
    """Cut a text and its end token into rows. A last piece of one token is dropped: it has no supervised token."""
    ids = [*encode(example.text, tokenizer, begin=True), *end_ids(tokenizer)]
    for start in range(0, len(ids) - 1, max_tokens):
        piece = ids[start : start + max_tokens]
        if len(piece) > 1:
            yield Row(input_ids=piece, labels=[IGNORED, *piece[1:]])


def context_ids(context: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encode a chat as the prompt of its next answer, with the same token ids as in training."""
    form = ChatFormat(tokenizer)
    return encode(form.prompt(context), tokenizer, begin=not form.has_template)
