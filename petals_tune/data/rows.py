"""Encoding: an example becomes rows of token ids, and of labels that are -100 where a token is not supervised.

The mask rule is written here alone: the answer and its end are supervised, the context is not. Of a plain text all
tokens are supervised but the first of each row, which nothing precedes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from petals_tune.data.examples import AnyExample, Chat, Example, LabelledText, Message, Text
from petals_tune.errors import DataError

IGNORED = -100  # the label that torch's cross entropy skips

SPEAKERS = {"user": "User", "assistant": "Assistant"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """T token ids, and T labels: the token itself where it is supervised, else -100. Labels are not shifted."""

    input_ids: list[int]
    labels: list[int]
    cut_tokens: int = 0  # tokens of the context that were left out to make the row short enough

    @property
    def supervised_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels)

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens before the first supervised one: the input for generating the answer."""
        return self.input_ids[: next(t for t, label in enumerate(self.labels) if label != IGNORED)]


def rows_of(example: AnyExample, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Row]:
    """Encode an example: its context, then the answer and the end of its turn.

    A long context loses its oldest turns, but not the system message, the last turn or any of the answer; where the row
    is longer than `max_tokens` even then, the list is empty. A long text becomes several rows.
    Raises DataError when the answer is empty, when a label word is not one token, or when the chat template refuses
    the messages.
    """
    if isinstance(example, Text):
        return list(_text_rows(example, tokenizer, max_tokens))
    full_length = 0
    for segments in _segments(example, tokenizer):
        length = sum(len(ids) for ids, _ in segments)
        full_length = full_length or length
        if length <= max_tokens:
            row = Row(
                input_ids=[token for ids, _ in segments for token in ids],
                labels=[token if supervised else IGNORED for ids, supervised in segments for token in ids],
                cut_tokens=full_length - length,
            )
            return [row]
    return []


# Consecutive token ids, and whether they are supervised.
Segment = tuple[list[int], bool]


def _segments(example: Example | Chat | LabelledText, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Segment]]:
    """Yield the segments of a row, with the whole context first and then with ever fewer of its turns."""
    match example:
        case LabelledText(prompt=prompt, word=word):
            yield [(tokenizer(prompt)["input_ids"], False), ([word_id(word, tokenizer)], True)]
        case Chat(messages=messages, learned=learned):
            encode = _template_segments if tokenizer.chat_template else _transcript_segments
            yield encode(list(messages[: learned[-1] + 1]), learned, tokenizer)
        case Example(context=context, answer=answer):
            if not (answer := answer.strip()):
                raise DataError(f"a row has an empty answer: {example}", seen=example.answer)
            encode = _template_segments if tokenizer.chat_template else _transcript_segments
            for shortened in _shortened_contexts(context):
                turns: list[Message] = [*shortened, {"role": "assistant", "content": answer}]
                last = len(turns) - 1
                supervised = [
                    position
                    for position, turn in enumerate(turns)
                    if turn["role"] == "assistant" and (example.every_answer or position == last)
                ]
                yield encode(turns, supervised, tokenizer)


def _text_rows(example: Text, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Iterator[Row]:
    """Cut a text and its end token into rows. A last piece of one token is dropped: it has no supervised token."""
    ids = [*tokenizer(example.text)["input_ids"], *_end_ids(tokenizer)]
    for start in range(0, len(ids) - 1, max_tokens):
        piece = ids[start : start + max_tokens]
        if len(piece) > 1:
            yield Row(input_ids=piece, labels=[IGNORED, *piece[1:]])


def context_ids(context: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encode a chat as the prompt of its next answer, with the same token ids as in training."""
    if tokenizer.chat_template:
        text = _apply_template(list(context), tokenizer, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer(f"{format_transcript(context)}{SPEAKERS['assistant']}:")["input_ids"]


def word_id(word: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token id of a label word. Raises DataError where the word is not exactly one token."""
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise DataError(
            f"the label word {word!r} is {len(ids)} tokens for this tokenizer ({tokenizer.convert_ids_to_tokens(ids)}),"
            " and a label must be one: take another word, with a leading space for most tokenizers",
            seen=word,
        )
    return ids[0]


def _shortened_contexts(context: Sequence[Message]) -> Iterator[list[Message]]:
    """Yield the context with ever more of its oldest turns left out, down to the user's last one.

    Each begins with a turn of the user (after the system message), since many chat templates refuse anything else.
    """
    system = [message for message in context if message["role"] == "system"]
    turns = [message for message in context if message["role"] != "system"]
    starts = [start for start, message in enumerate(turns) if message["role"] == "user"]
    for start in starts or [len(turns)]:
        yield system + turns[start:]


def _template_segments(
    turns: list[Message], supervised: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[Segment]:
    """Encode turns by the tokenizer's chat template; `supervised` are the indices of supervised turns, in order."""
    segments: list[Segment] = []
    encoded = ""
    for position in supervised:
        prompt = _apply_template(turns[:position], tokenizer, add_generation_prompt=True)
        chat = _apply_template(turns[: position + 1], tokenizer, add_generation_prompt=False)
        if not (chat.startswith(prompt) and prompt.startswith(encoded)):
            raise DataError(
                f"the tokenizer's chat template has no place for an answer: {prompt!r} does not begin {chat!r}",
                seen=chat,
            )
        answer = turns[position]["content"].strip()
        # A template may add a line break after the end of the turn, which a model should not learn to generate.
        reply = chat[len(prompt) :].rstrip()
        # Tokenized apart, where generation starts, so that training and generation see the same tokens.
        segments.append((tokenizer(prompt[len(encoded) :], add_special_tokens=False)["input_ids"], False))
        reply_ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
        segments.append((reply_ids + _end_ids(tokenizer) if reply.endswith(answer) else reply_ids, True))
        encoded = prompt + reply
    return segments


def _apply_template(messages: list[Message], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the tokenizer's chat template refuses the turns {roles}: {error}",
            seen=tuple(message["role"] for message in messages),
        ) from error
    assert isinstance(text, str)  # one chat, not tokenized
    return text


def _transcript_segments(
    turns: list[Message], supervised: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[Segment]:
    """Encode turns as a transcript; `supervised` as in `_template_segments`."""
    segments: list[Segment] = []
    done = 0
    for position in supervised:
        between = f"{format_transcript(turns[done:position])}{SPEAKERS['assistant']}:"
        segments.append((tokenizer(between, add_special_tokens=not done)["input_ids"], False))
        answer = tokenizer(f" {turns[position]['content'].strip()}", add_special_tokens=False)["input_ids"]
        segments.append((answer + _end_ids(tokenizer), True))
        done = position + 1
    return segments


def format_transcript(context: Sequence[Message]) -> str:
    """Format a chat for tokenizers without a chat template: one line per turn, `User: ...`."""
    system = (f"{message['content']}\n\n" for message in context if message["role"] == "system")
    turns = (f"{SPEAKERS[m['role']]}: {m['content']}\n" for m in context if m["role"] != "system")
    return "".join([*system, *turns])


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id]
    return tokenizer("\n", add_special_tokens=False)["input_ids"]
