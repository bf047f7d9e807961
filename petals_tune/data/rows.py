"""An example becomes a row: token ids, and labels that are -100 wherever nothing is learned. Pure functions.

The mask rule is written here and nowhere else: the context is read, the answer and its end are learned.
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


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """A prompt, and the word that must come next: a single token such as " positive", its leading space included."""

    prompt: str
    word: str


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


def encode(example: Example | LabelledText, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Row:
    """The row of an example: its context, then the answer and the end of its turn.

    A long context loses its oldest turns, never the system message, the last turn or any of the answer.
    Raises DataError when even so the row has more than max_tokens tokens, when the answer is empty, when a label
    word is not one token, or when the chat template refuses the messages.
    """
    row = fit(example, tokenizer, max_tokens)
    if row is None:
        raise DataError(f"a row does not fit into {max_tokens} tokens with its last turn and its answer: {example}")
    return row


def fit(example: Example | LabelledText, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Row | None:
    """As `encode`, but None where the row is too long: a corpus may hold such rows, and can do without them."""
    whole_tokens = 0
    for prompt_ids, answer_ids in _token_ids(example, tokenizer):
        whole_tokens = whole_tokens or len(prompt_ids)
        if len(prompt_ids) + len(answer_ids) <= max_tokens:
            return Row(
                input_ids=prompt_ids + answer_ids,
                labels=[IGNORED] * len(prompt_ids) + answer_ids,
                cut_tokens=whole_tokens - len(prompt_ids),
            )
    return None


def _token_ids(
    example: Example | LabelledText, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int]]]:
    """(context, answer) as token ids, once for each way to shorten the context, the whole one first."""
    match example:
        case LabelledText(prompt=prompt, word=word):
            yield tokenizer(prompt)["input_ids"], [word_id(word, tokenizer)]
        case Example(context=context, answer=answer):
            if not (answer := answer.strip()):
                raise DataError(f"a row has an empty answer: {example}")
            as_ids = _template_ids if tokenizer.chat_template else _transcript_ids
            yield from (as_ids(shorter, answer, tokenizer) for shorter in _shortened(context))


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


def _template_ids(
    context: list[Message], answer: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    prompt = _chat_text(context, tokenizer, add_generation_prompt=True)
    chat = _chat_text([*context, {"role": "assistant", "content": answer}], tokenizer, add_generation_prompt=False)
    if not chat.startswith(prompt):
        raise DataError(f"the tokenizer's chat template has no place for an answer: {prompt!r} does not begin {chat!r}")
    # The template may go on after the end of the turn (a line break): no model should learn to say that.
    reply = chat[len(prompt) :].rstrip()
    # The text is cut where generation starts, so that training and generation see the same tokens.
    prompt_ids = context_ids(context, tokenizer)
    reply_ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
    return prompt_ids, reply_ids + _end_ids(tokenizer) if reply.endswith(answer) else reply_ids


def _chat_text(messages: list[Message], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the tokenizer's chat template refuses the turns {roles}: {error}") from error
    assert isinstance(text, str)  # one chat, not tokenized
    return text


def _transcript_ids(
    context: list[Message], answer: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    return (
        context_ids(context, tokenizer),
        tokenizer(f" {answer}", add_special_tokens=False)["input_ids"] + _end_ids(tokenizer),
    )


def transcript(context: Sequence[Message]) -> str:
    """The context as readable text, for tokenizers without a chat template: `User: ...`, a turn a line."""
    system = (f"{message['content']}\n\n" for message in context if message["role"] == "system")
    turns = (f"{SPEAKERS[m['role']]}: {m['content']}\n" for m in context if m["role"] != "system")
    return "".join([*system, *turns])


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id]
    return tokenizer("\n", add_special_tokens=False)["input_ids"]
