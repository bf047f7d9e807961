"""Rows of a chat: rendered whole and tokenized as one text, with the answers found in it.

Before every learned answer stands, token for token, what generation would have sent: the rendered turns before it and
the template's generation prompt. Learned is what the template writes after that, up to the end of the turn: the answer,
an empty think block where the template writes one, and the special tokens that follow, such as <|im_end|>.

Templates write a turn that others follow in another way than the last turn: they leave out its reasoning (Qwen3), or
end it with another token (gpt-oss). An answer is learned in the row of the whole chat where it stands there with the
same end and no reasoning of it is missing; every other answer has a row of its own, in which it is the last turn.

An answer's place is found by rendering and tokenizing the prompt before it, and comparing that with the whole: this is
the invariant itself, and needs no offsets, which tokenizers in Python lack. transformers' assistant masks and TRL's
training templates mark answers in templates that were rewritten for it, and compare nothing with what generation sends;
this way takes every template as it is, the one that the model was trained with. It costs two renderings and two
tokenizations an answer: 1 to 2 ms in chats of up to ten turns.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from transformers import PreTrainedTokenizerBase

from petals_tune.data.chat_format import ChatFormat, Tools
from petals_tune.data.examples import Chat, Message
from petals_tune.data.tokens import encode, end_ids, find_spans
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
    answers_too_long: int = 0  # answers of the same chat that no row is long enough for; in the chat's first row

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


def chat_rows(chat: Chat, tokenizer: PreTrainedTokenizerBase, max_tokens: int, *, from_user: bool) -> list[Row]:
    """Return the rows of a chat, the one with its last answer first.

    A long chat loses its oldest turns, but not the system message, and not the user's last turn. An answer that is lost
    so, or stands in the row otherwise than generation would give it, has a row of its own; one that is too long even
    then has none, and is counted in the first row. from_user: the first turn after the system message is the user's;
    what comes before it is left out.

    Raises DataError where the template refuses the turns, or gives an answer no place.
    """
    form = ChatFormat(tokenizer)
    # An assistant that speaks first was asked for nothing: that turn is read, and learned only where no other is.
    first = next((place for place, turn in enumerate(chat.messages) if turn["role"] == "user"), len(chat.messages))
    waiting = [position for position in chat.learned if position > first] or list(chat.learned)
    rows: list[Row] = []
    too_long = 0
    while waiting:
        starts = _starts(chat.messages[: waiting[-1] + 1], from_user=from_user)
        row, learned = _longest_row(chat, waiting, starts, form, tokenizer, max_tokens)
        if row is None:
            too_long += 1
        else:
            rows.append(row)
        waiting = [position for position in waiting[:-1] if position not in learned]
    return [replace(rows[0], answers_too_long=too_long), *rows[1:]] if rows else []


def _starts(messages: Sequence[Message], *, from_user: bool) -> list[int]:
    """Return where a chat may begin after its system message, with ever fewer turns, down to the user's last one.

    That is with a turn of the user, since many templates refuse anything else; or with its first turn.
    """
    turns = range(_system_turns(messages), len(messages))
    starts = [start for start in turns if messages[start]["role"] == "user"]
    if not from_user and starts[:1] != [turns.start]:
        starts = [turns.start, *starts]
    return starts or [len(messages) - 1]


def _system_turns(messages: Sequence[Message]) -> int:
    return 1 if messages[0]["role"] == "system" else 0


def _longest_row(
    chat: Chat,
    positions: Sequence[int],
    starts: Sequence[int],
    form: ChatFormat,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
) -> tuple[Row | None, list[int]]:
    """Return the row of the chat up to the last of `positions`, from the first of `starts` that is short enough.

    With it, those of `positions` that are learned in it. The row is None where all are too long.
    """
    head = _system_turns(chat.messages)

    @cache
    def row_from(start: int) -> tuple[Row, list[int]]:
        kept = [*range(head), *range(start, positions[-1] + 1)]
        learned = [index for index, position in enumerate(kept) if position in positions]
        messages = [chat.messages[position] for position in kept]
        row, learned = _encode(messages, learned, chat.tools, form, tokenizer, max_tokens)
        return row, [kept[index] for index in learned]

    def fits(start: int) -> bool:
        return len(row_from(start)[0].input_ids) <= max_tokens

    try:
        full, _ = row_from(starts[0])
    except DataError:
        if len(starts) == 1 or chat.messages[starts[0]]["role"] == "user":
            raise
        starts = starts[1:]  # many templates refuse a chat that begins with the assistant
        full, _ = row_from(starts[0])
    # Fewer turns are fewer tokens, so that a bisection finds the first that fits.
    at = 0 if fits(starts[0]) else bisect_left(starts, True, lo=1, key=fits)
    if at == len(starts):
        return None, []
    row, learned = row_from(starts[at])
    return replace(row, cut_tokens=len(full.input_ids) - len(row.input_ids)), learned


def _encode(
    messages: list[Message],
    learned: Sequence[int],
    tools: Tools,
    form: ChatFormat,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
) -> tuple[Row, list[int]]:
    """Return the row of a chat that ends with the last of the `learned` turns, and which of them are learned in it.

    In a row that is longer than `max_tokens` they are not looked for.
    """
    last = _answer(messages, tools, form, tokenizer)
    whole = last.prompt + last.text
    ids = encode(whole, tokenizer, begin=not form.has_template)
    end = [] if last.end else end_ids(tokenizer)
    if len(ids) + len(end) > max_tokens:
        return Row(input_ids=ids + end, labels=[IGNORED] * len(ids + end)), []
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
    ids, places = find_spans(whole, ids, spans, tokenizer, begin=not form.has_template)
    labels = [IGNORED] * len(ids)
    for start, stop in places.values():
        labels[start:stop] = ids[start:stop]
    return Row(input_ids=ids + end, labels=labels + end), list(places)


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
    """The special tokens at the beginning of a text, and the space before them, which some templates write."""
    special, start = _special_tokens(tokenizer), len(text) - len(text.lstrip())
    end = start
    while token := next((token for token in special if text.startswith(token, end)), ""):
        end += len(token)
    return text[:end] if end > start else ""


def _trailing_special(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    special, start = _special_tokens(tokenizer), len(text)
    while token := next((token for token in special if text.endswith(token, 0, start)), ""):
        start -= len(token)
    return text[start:]


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that are in the tokenizer's texts as they are, the longest first."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    tokens = {
        token for token in (*tokenizer.all_special_tokens, *added) if token.strip()
    }  # GPT-NeoX has runs of spaces
    return sorted(tokens, key=len, reverse=True)
