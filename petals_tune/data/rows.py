"""An example becomes rows: token ids, and labels that are -100 wherever nothing is learned. Pure functions.

The mask rule is written here and nowhere else: the context is read, the answer and its end are learned. Of a plain text
all is learned but its first token, which nothing precedes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from petals_tune.errors import DataError

IGNORED = -100  # the label that torch's cross entropy skips

SPEAKERS = {"user": "User", "assistant": "Assistant"}

# One turn, as chat templates take it: {"role": "system" | "user" | "assistant", "content": ...}.
Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A chat so far, and the assistant's answer, which is what is learned."""

    context: tuple[Message, ...]
    answer: str
    every_answer: bool = False  # learn the assistant's turns in the context too


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """A prompt, and the word that must come next: a single token such as " positive", its leading space included."""

    prompt: str
    word: str


@dataclass(frozen=True, kw_only=True)
class Text:
    """Plain text, learned whole."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """Token ids of one row, T of them. labels[t] is the token at t where it is learned, else -100 (not shifted)."""

    input_ids: list[int]
    labels: list[int]
    cut_tokens: int = 0  # of the context, left out so that the row fits

    @property
    def supervised_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels)

    @property
    def prompt_ids(self) -> list[int]:
        """What comes before the first learned token: the input for generating the answer."""
        return self.input_ids[: next(t for t, label in enumerate(self.labels) if label != IGNORED)]


def rows_of(example: Example | LabelledText | Text, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Row]:
    """The rows of an example: its context, then the answer and the end of its turn.

    A long context loses its oldest turns, never the system message, the last turn or any of the answer; where even so
    the row has more than max_tokens tokens, there is no row. A long text becomes several rows.
    Raises DataError when the answer is empty, when a label word is not one token, or when the chat template refuses
    the messages.
    """
    if isinstance(example, Text):
        return list(_pieces(example, tokenizer, max_tokens))
    whole_tokens = 0
    for segments in _segments(example, tokenizer):
        tokens = sum(len(ids) for ids, _ in segments)
        whole_tokens = whole_tokens or tokens
        if tokens <= max_tokens:
            row = Row(
                input_ids=[token for ids, _ in segments for token in ids],
                labels=[token if learned else IGNORED for ids, learned in segments for token in ids],
                cut_tokens=whole_tokens - tokens,
            )
            return [row]
    return []


# Token ids in a row, and whether they are learned.
Segment = tuple[list[int], bool]


def _segments(example: Example | LabelledText, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Segment]]:
    """The parts of a row, once for each way to shorten the context, the whole one first."""
    match example:
        case LabelledText(prompt=prompt, word=word):
            yield [(tokenizer(prompt)["input_ids"], False), ([word_id(word, tokenizer)], True)]
        case Example(context=context, answer=answer):
            if not (answer := answer.strip()):
                raise DataError(f"a row has an empty answer: {example}")
            as_segments = _template_segments if tokenizer.chat_template else _transcript_segments
            for shorter in _shortened(context):
                turns = [*shorter, {"role": "assistant", "content": answer}]
                last = len(turns) - 1
                learned = [
                    position
                    for position, turn in enumerate(turns)
                    if turn["role"] == "assistant" and (example.every_answer or position == last)
                ]
                yield as_segments(turns, learned, tokenizer)


def _pieces(example: Text, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Iterator[Row]:
    """A text and its end, cut where a row is full. A last piece of one token would teach nothing."""
    ids = [*tokenizer(example.text)["input_ids"], *_end_ids(tokenizer)]
    for start in range(0, len(ids) - 1, max_tokens):
        piece = ids[start : start + max_tokens]
        if len(piece) > 1:
            yield Row(input_ids=piece, labels=[IGNORED, *piece[1:]])


def context_ids(context: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A chat as the token ids that its next answer follows: those that training saw before the answer."""
    if tokenizer.chat_template:
        text = _chat_text(list(context), tokenizer, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer(f"{transcript(context)}{SPEAKERS['assistant']}:")["input_ids"]


def word_id(word: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The one token of a label word. Raises DataError, with the tokens seen, where it is not exactly one."""
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise DataError(
            f"the label word {word!r} is {len(ids)} tokens for this tokenizer ({tokenizer.convert_ids_to_tokens(ids)}),"
            " and a label must be one: take another word, with a leading space for most tokenizers"
        )
    return ids[0]


def _shortened(context: Sequence[Message]) -> Iterator[list[Message]]:
    """The context without its oldest turns, from none left out to all but the last.

    What is left begins with a turn of the user, since many chat templates refuse anything else.
    """
    system = [message for message in context if message["role"] == "system"]
    turns = [message for message in context if message["role"] != "system"]
    starts = [start for start, message in enumerate(turns) if message["role"] == "user"]
    for start in starts or [len(turns)]:
        yield system + turns[start:]


def _template_segments(
    turns: list[Message], learned: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[Segment]:
    """`learned` are the positions of the turns that are learned, in order."""
    segments: list[Segment] = []
    seen = ""
    for position in learned:
        prompt = _chat_text(turns[:position], tokenizer, add_generation_prompt=True)
        chat = _chat_text(turns[: position + 1], tokenizer, add_generation_prompt=False)
        if not (chat.startswith(prompt) and prompt.startswith(seen)):
            raise DataError(
                f"the tokenizer's chat template has no place for an answer: {prompt!r} does not begin {chat!r}"
            )
        answer = turns[position]["content"].strip()
        # The template may go on after the end of the turn (a line break): no model should learn to say that.
        reply = chat[len(prompt) :].rstrip()
        # The text is cut where generation starts, so that training and generation see the same tokens.
        segments.append((tokenizer(prompt[len(seen) :], add_special_tokens=False)["input_ids"], False))
        reply_ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
        segments.append((reply_ids + _end_ids(tokenizer) if reply.endswith(answer) else reply_ids, True))
        seen = prompt + reply
    return segments


def _chat_text(messages: list[Message], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the tokenizer's chat template refuses the turns {roles}: {error}") from error
    assert isinstance(text, str)  # one chat, not tokenized
    return text


def _transcript_segments(
    turns: list[Message], learned: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[Segment]:
    segments: list[Segment] = []
    done = 0
    for position in learned:
        between = f"{transcript(turns[done:position])}{SPEAKERS['assistant']}:"
        segments.append((tokenizer(between, add_special_tokens=not done)["input_ids"], False))
        answer = tokenizer(f" {turns[position]['content'].strip()}", add_special_tokens=False)["input_ids"]
        segments.append((answer + _end_ids(tokenizer), True))
        done = position + 1
    return segments


def transcript(context: Sequence[Message]) -> str:
    """The context as readable text, for tokenizers without a chat template: `User: ...`, a turn a line."""
    system = (f"{message['content']}\n\n" for message in context if message["role"] == "system")
    turns = (f"{SPEAKERS[m['role']]}: {m['content']}\n" for m in context if m["role"] != "system")
    return "".join([*system, *turns])


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id]
    return tokenizer("\n", add_special_tokens=False)["input_ids"]
