"""Rows of a chat: rendered once, whole, tokenized once, with the answers found in it.

Before every learned answer stands, token for token, what generation would have sent: the rendered turns before it and
the template's generation prompt. Learned is what the template writes after that, up to the end of the turn: the answer,
an empty think block where the template writes one, and the special tokens that directly follow, such as <|im_end|>.

Templates write a turn that others follow in another way than the last turn: they leave out its reasoning (Qwen3), or
end it with another token (gpt-oss). An answer is learned in the row of the whole chat where it stands there with the
same end and no reasoning of it is missing; every other answer has a row of its own, in which it is the last turn.

transformers' assistant masks and TRL's training templates do the same for templates that were rewritten for it; this
way takes every template as it is, the one that the model was trained with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from petals_tune.data.chat_format import ChatFormat, Tools
from petals_tune.data.examples import Chat, Message
from petals_tune.data.tokens import encode_spans, end_ids
from petals_tune.errors import DataError

IGNORED = -100  # the label that torch's cross entropy skips

_THINK = re.compile(r"<think>\s*\Z")  # at the end of a generation prompt: the model is to think first
_REASONING = re.compile(r"\A\s*(?:<think>)?(?P<reasoning>.*?)</think>\s*(?P<answer>.*)\Z", re.DOTALL)


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


@dataclass(frozen=True)
class _Answer:
    """A turn of the assistant, as generation would give it, alone after its prompt."""

    prompt: str  # what generation would send
    text: str  # what it would answer, with the end of the turn
    content: str  # the answer itself in `text`
    end: str  # what follows `content` in `text`
    reasons: bool  # it has reasoning, which a turn in the middle of a chat may lose


def chat_rows(chat: Chat, tokenizer: PreTrainedTokenizerBase, max_tokens: int, *, from_user: bool) -> Iterator[Row]:
    """Yield the rows of a chat, the one with its last answer first.

    A long chat loses its oldest turns, but not the system message, and not the user's last turn. An answer that is lost
    so, or stands in the row otherwise than generation would give it, has a row of its own; one that is too long even
    then has none. from_user: the first turn after the system message is the user's; what comes before it is left out.

    Raises DataError where the template refuses the turns, or gives an answer no place.
    """
    form = ChatFormat(tokenizer)
    waiting = list(chat.learned)
    while waiting:
        last = waiting.pop()
        full_length = 0
        refusal: DataError | None = None
        for kept in _shortened(chat.messages[: last + 1], from_user=from_user):
            # Positions in the shortened chat of the turns that are still to be learned.
            there = {kept.index(position): position for position in (*waiting, last) if position in kept}
            try:
                row, learned = _encode([chat.messages[n] for n in kept], sorted(there), chat.tools, form, tokenizer)
            except DataError as error:
                refusal = refusal or error  # of a chat that begins with the assistant, say: try it without
                continue
            full_length = full_length or len(row.input_ids)
            if len(row.input_ids) <= max_tokens:
                done = {there[index] for index in learned}
                waiting = [position for position in waiting if position not in done]
                yield replace(row, cut_tokens=full_length - len(row.input_ids))
                break
        else:
            opens = not any(message["role"] == "user" for message in chat.messages[:last])
            # No template has a prompt for an answer to nothing: it is read, and learned nowhere.
            if not full_length and refusal is not None and not (opens and len(chat.learned) > 1):
                raise refusal


def _shortened(messages: Sequence[Message], *, from_user: bool) -> Iterator[list[int]]:
    """Yield the positions of the turns of a chat, with ever more of the oldest left out, down to the user's last one.

    Each chat begins with a turn of the user (after the system message), since many templates refuse anything else.
    """
    head = [0] if messages[0]["role"] == "system" else []
    turns = range(len(head), len(messages))
    starts = [start for start in turns if messages[start]["role"] == "user"]
    if not from_user and starts[:1] != [turns.start]:
        starts = [turns.start, *starts]
    for start in starts or [len(messages) - 1]:
        yield [*head, *range(start, len(messages))]


def _encode(
    messages: list[Message],
    learned: Sequence[int],
    tools: Tools,
    form: ChatFormat,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Row, list[int]]:
    """Return the row of a chat that ends with the last of the `learned` turns, and which of them are learned in it."""
    last = _answer(messages, tools, form, tokenizer)
    whole = last.prompt + last.text
    spans = {learned[-1]: (len(last.prompt), len(whole))}  # position of a turn -> where it stands in the text
    for position in learned[:-1]:
        try:
            answer = _answer(messages[: position + 1], tools, form, tokenizer)
        except DataError:
            continue  # it is refused where it is the last turn
        for text in (answer.text, "" if answer.reasons else answer.content + answer.end):
            if text and answer.end and whole.startswith(answer.prompt + text):
                spans[position] = (len(answer.prompt), len(answer.prompt + text))
                break
    ids, places = encode_spans(whole, spans, tokenizer, begin=not form.has_template)
    labels = [IGNORED] * len(ids)
    for start, end in places.values():
        labels[start:end] = ids[start:end]
    if not last.end:
        ids, labels = ids + end_ids(tokenizer), labels + end_ids(tokenizer)
    return Row(input_ids=ids, labels=labels), list(places)


def _answer(messages: Sequence[Message], tools: Tools, form: ChatFormat, tokenizer: PreTrainedTokenizerBase) -> _Answer:
    """The last of the messages, as generation would give it after those before it."""
    turn = messages[-1]
    content = (turn.get("content") or "").strip()
    if not content and not turn.get("tool_calls"):
        raise DataError(f"a row has an empty answer: {messages}", seen=turn.get("content"), reason="an empty answer")
    prompt, text = form.prompt(messages[:-1], tools), form.whole(messages, tools)
    reasoning, content = _split_reasoning(turn, content)
    if text.startswith(prompt):
        text = text[len(prompt) :]
    elif (opened := _THINK.search(prompt)) and text.startswith(prompt[: opened.start()]):
        # The generation prompt opens a think block, and the template leaves out that of a whole chat.
        text = f"{reasoning.strip()}\n</think>\n\n{text[opened.start() :].lstrip()}"
    else:
        raise DataError(
            f"the tokenizer's chat template has no place for an answer: {prompt!r} does not begin {text!r}",
            seen=text,
            reason="an answer that the chat template has no place for",
        )
    at = _find(content, text, tokenizer) if content else 0
    if at < 0:
        raise DataError(
            f"the tokenizer's chat template does not write the answer {content!r} as it is: {text!r}",
            seen=content,
            reason="an answer that the chat template changes",
        )
    if not content or turn.get("tool_calls"):  # what the template writes for the calls is the answer
        content, at = text.rstrip(), 0
        end = _trailing_special(content, tokenizer)
        content = content[: len(content) - len(end)]
    else:
        end = _leading_special(text[at + len(content) :], tokenizer)
    return _Answer(prompt, text[: at + len(content)] + end, content, end, bool(reasoning.strip()))


def _find(content: str, text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The position of an answer in `text`: the last one that only special tokens follow, so that `end` is not found in
    <|im_end|>; else the last one; -1 where it does not stand there."""
    special = re.compile("|".join(map(re.escape, _special_tokens(tokenizer))) or r"\Z")
    at = last = text.rfind(content)
    while at >= 0 and special.sub("", text[at + len(content) :]).strip():
        at = text.rfind(content, 0, at + len(content) - 1)
    return at if at >= 0 else last


def _split_reasoning(turn: Message, content: str) -> tuple[str, str]:
    """Return the reasoning of a turn, and its answer."""
    if reasoning := turn.get("reasoning_content"):
        return reasoning, content
    if found := _REASONING.match(content):
        return found["reasoning"], found["answer"].strip()
    return "", content


def _leading_special(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The special tokens at the beginning of a text, with nothing between them."""
    special, end = _special_tokens(tokenizer), 0
    while token := next((token for token in special if text.startswith(token, end)), ""):
        end += len(token)
    return text[:end]


def _trailing_special(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    special, start = _special_tokens(tokenizer), len(text)
    while token := next((token for token in special if text.endswith(token, 0, start)), ""):
        start -= len(token)
    return text[start:]


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that are in the tokenizer's texts as they are, the longest first."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    return sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
