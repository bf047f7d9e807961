"""Token ids of texts and label words, for tokenizers of several kinds."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from petals_tune.data.examples import Example, LabelledText, Message, Text
from petals_tune.data.rows import IGNORED, context_ids, rows_of, word_id
from petals_tune.data.tokens import encode, end_ids, word_ids
from petals_tune.errors import DataError
from tests.data.kinds import KINDS, metaspace
from tests.raising import raises

Make = Callable[[], PreTrainedTokenizerBase]

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}

# HuggingFaceH4/zephyr-7b-beta's, and Mistral's without its checks.
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
CONTEXT: tuple[Message, ...] = (
    {"role": "user", "content": "What is it ?"},
    {"role": "assistant", "content": "tea"},
    {"role": "user", "content": "hot ?"},
)


def llama() -> PreTrainedTokenizerBase:
    """As transformers 5 reads Llama 2's: with <s> before each text."""
    model = json.loads(metaspace().to_str())["model"]
    return LlamaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], add_bos_token=True)


def prepend() -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_object=KINDS["prepend"](), **SPECIAL)


def ending() -> PreTrainedTokenizerBase:
    """With <s> before each text and </s> behind it, as add_eos_token=true makes it."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS["metaspace"](), **SPECIAL)
    start, end = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", start), ("</s>", end)]
    )
    return tokenizer


def words_alone(*, lower: bool) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "film": 1, "good": 2, "bad": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("make", [llama, prepend, ending])
@pytest.mark.parametrize("template", [ZEPHYR, MISTRAL])
def test_a_row_has_the_tokens_of_the_whole_text_and_no_stray_word_mark(make: Make, template: str) -> None:
    tokenizer = make()
    tokenizer.chat_template = template
    (row,) = rows_of(Example(context=CONTEXT, answer="The end", every_answer=True), tokenizer, 500)
    text = tokenizer.apply_chat_template([*CONTEXT, {"role": "assistant", "content": "The end"}], tokenize=False)
    whole = tokenizer(text.rstrip(), add_special_tokens=False, return_offsets_mapping=True)
    assert row.input_ids == whole["input_ids"]
    answer = text.index("The end")
    start = next(n for n, (_, end) in enumerate(whole["offset_mapping"]) if end > answer)
    assert [label for label in row.labels[start:] if label != IGNORED] == whole["input_ids"][start:]
    prompt = context_ids(CONTEXT, tokenizer)
    assert row.input_ids[: len(prompt)] == prompt


@pytest.mark.parametrize("make", [llama, prepend, ending])
def test_a_transcript_is_one_text_with_one_beginning_and_one_end(make: Make) -> None:
    tokenizer = make()
    (row,) = rows_of(Example(context=CONTEXT, answer="The end"), tokenizer, 500)
    text = "User: What is it ?\nAssistant: tea\nUser: hot ?\nAssistant: The end"
    begin = [] if make is prepend else [tokenizer.bos_token_id]
    assert row.input_ids == [*begin, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert row.prompt_ids == context_ids(CONTEXT, tokenizer)


def test_a_text_has_one_end_where_the_tokenizer_appends_one_and_the_prompt_of_a_label_none() -> None:
    tokenizer = ending()
    (row,) = rows_of(Text(text="The capital"), tokenizer, 50)
    assert row.input_ids == tokenizer("The capital")["input_ids"]
    (row,) = rows_of(LabelledText(prompt="What is it ?", word=" positive"), tokenizer, 50)
    assert tokenizer.eos_token_id not in row.input_ids
    assert row.input_ids == tokenizer("What is it ? positive")["input_ids"][:-1]


def test_a_tokenizer_without_an_end_token_ends_a_text_with_a_line_break() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS["byte level"]())
    assert end_ids(tokenizer) == tokenizer("\n")["input_ids"]
    assert end_ids(ByT5Tokenizer()) == [ByT5Tokenizer().eos_token_id]


@pytest.mark.parametrize("make", [llama, prepend, ending])
def test_a_label_word_is_the_token_that_it_is_behind_a_text(make: Make) -> None:
    tokenizer = make()
    whole = encode("What is it: positive", tokenizer)
    assert word_id(" positive", tokenizer) == whole[-1]
    assert tokenizer.convert_ids_to_tokens(whole[-1]) == "▁positive"


@pytest.mark.parametrize(
    ("lower", "words", "seen"),
    [(False, [" zzz", " yyy"], " zzz"), (False, ["good", " good"], "good"), (True, ["good", "Good"], "good")],
)
def test_label_words_that_are_unknown_or_one_token_are_refused(lower: bool, words: list[str], seen: str) -> None:
    tokenizer = words_alone(lower=lower)
    with raises(DataError, seen=seen):
        word_ids(words, tokenizer)
    assert word_ids([" good", " bad"], tokenizer) == [2, 3]
