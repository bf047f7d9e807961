from itertools import islice

import pytest
from transformers import PreTrainedTokenizerBase

from petals_tune.data.chitchat import ChitChat
from petals_tune.data.examples import Example, LabelledText, Message, Text
from petals_tune.data.rows import IGNORED, Row, context_ids, rows_of
from petals_tune.errors import DataError
from tests.raising import raises

SYSTEM: Message = {"role": "system", "content": "You are chatting."}


def chat(*turns: str, answer: str = "Fine, thanks!", system: bool = True) -> Example:
    """Turns of user and assistant in alternation, the last one the user's."""
    roles = ["user", "assistant"] if len(turns) % 2 else ["assistant", "user"]
    messages = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return Example(context=(*([SYSTEM] if system else []), *messages), answer=answer)


def learned(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != IGNORED]))


def encode(example: Example | LabelledText, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Row:
    (row,) = rows_of(example, tokenizer, max_tokens)
    return row


def test_only_the_answer_and_the_end_of_its_turn_are_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    row = encode(chat("Hi, how are you?"), tokenizer, max_tokens=100)
    assert learned(row, tokenizer) == "Fine, thanks!<|im_end|>"
    assert tokenizer.decode(row.prompt_ids) == (
        "<|im_start|>system\nYou are chatting.<|im_end|>\n"
        "<|im_start|>user\nHi, how are you?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert row.cut_tokens == 0


def test_training_and_generation_see_the_same_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    example = chat("Hello", "Hi there", "What now?")
    at_generation = tokenizer.apply_chat_template(list(example.context), add_generation_prompt=True, return_dict=True)
    assert encode(example, tokenizer, max_tokens=100).prompt_ids == at_generation["input_ids"]


def test_long_contexts_lose_their_oldest_turns_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    example = chat("oldest question", "old answer", "newer question", "newer answer", "newest question")
    whole = encode(example, tokenizer, max_tokens=1000)
    row = encode(example, tokenizer, max_tokens=len(whole.input_ids) - 1)
    text = str(tokenizer.decode(row.prompt_ids))
    assert "old" not in text
    assert "You are chatting." in text
    assert "<|im_end|>\n<|im_start|>user\nnewer question" in text
    assert learned(row, tokenizer) == learned(whole, tokenizer)
    assert row.cut_tokens == len(whole.input_ids) - len(row.input_ids)


def test_a_context_begins_with_the_user(tokenizer: PreTrainedTokenizerBase) -> None:
    row = encode(chat("I speak first", "Then you"), tokenizer, max_tokens=100)
    assert "I speak first" not in str(tokenizer.decode(row.prompt_ids))


def test_the_limit_is_exact_and_the_answer_is_never_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    example = chat("Hi")
    length = len(encode(example, tokenizer, max_tokens=1000).input_ids)
    assert len(encode(example, tokenizer, max_tokens=length).input_ids) == length
    assert rows_of(example, tokenizer, length - 1) == []


@pytest.mark.parametrize("answer", ["", "  \n"])
def test_an_empty_answer_is_an_error(tokenizer: PreTrainedTokenizerBase, answer: str) -> None:
    with raises(DataError, seen=answer):
        encode(chat("Hi", answer=answer), tokenizer, max_tokens=100)


def test_without_a_chat_template_a_chat_is_a_transcript(bare: PreTrainedTokenizerBase) -> None:
    row = encode(chat("Hi", "Hello", "How are you?"), bare, max_tokens=100)
    assert bare.decode(row.prompt_ids) == (
        "You are chatting.\n\nUser: Hi\nAssistant: Hello\nUser: How are you?\nAssistant:"
    )
    assert learned(row, bare) == " Fine, thanks!<|im_end|>"


def test_a_template_without_an_end_of_turn_gets_one(bare: PreTrainedTokenizerBase) -> None:
    bare.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert learned(encode(chat("Hi"), bare, max_tokens=100), bare) == "Fine, thanks!<|im_end|>"


def test_a_template_that_refuses_the_turns_is_a_data_error(bare: PreTrainedTokenizerBase) -> None:
    bare.chat_template = "{{ raise_exception('System role not supported') }}"
    with raises(DataError, seen=("system", "user")):
        encode(chat("Hi"), bare, max_tokens=100)


def test_a_template_that_rewrites_the_prompt_is_a_data_error(bare: PreTrainedTokenizerBase) -> None:
    bare.chat_template = "{{ messages | length }} turns"
    with raises(DataError, seen="2 turns"):  # without the system turn, which it does not write
        encode(chat("Hi"), bare, max_tokens=100)


def test_a_label_word_is_the_one_learned_token_at_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    row = encode(LabelledText(prompt="Review: good .\nSentiment:", word=" positive"), tokenizer, max_tokens=20)
    assert tokenizer.decode(row.input_ids) == "Review: good .\nSentiment: positive"
    assert row.supervised_tokens == 1
    assert row.labels[-1] == row.input_ids[-1] == tokenizer.convert_tokens_to_ids("Ġpositive")


def test_a_label_word_of_several_tokens_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with raises(DataError, seen=" unputdownable"):
        encode(LabelledText(prompt="Review: good .\nSentiment:", word=" unputdownable"), tokenizer, max_tokens=50)


def test_real_rows_keep_the_mask_rule(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [row for example in islice(ChitChat().train(), 100) for row in rows_of(example, tokenizer, 112)]
    assert len(rows) > 50
    for row in rows:
        start = len(row.prompt_ids)
        assert len(row.input_ids) <= 112
        assert row.labels == [IGNORED] * start + row.input_ids[start:]
        assert row.input_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row.prompt_ids).endswith("<|im_end|>\n<|im_start|>assistant\n")


def dialogue(*, every_answer: bool) -> Example:
    example = chat("Hi", "Hello.", "What now?")
    return Example(context=example.context, answer=example.answer, every_answer=every_answer)


def test_every_answer_of_a_chat_can_be_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    all_of_them, last = (encode(dialogue(every_answer=every), tokenizer, 100) for every in (True, False))
    assert all_of_them.input_ids == last.input_ids
    assert learned(last, tokenizer) == "Fine, thanks!<|im_end|>"
    assert learned(all_of_them, tokenizer) == "Hello.<|im_end|>Fine, thanks!<|im_end|>"


def test_every_answer_of_a_transcript_has_a_row_since_its_end_is_not_in_the_others_context(
    bare: PreTrainedTokenizerBase,
) -> None:
    last, first = rows_of(dialogue(every_answer=True), bare, 100)
    assert [learned(row, bare) for row in (first, last)] == [" Hello.<|im_end|>", " Fine, thanks!<|im_end|>"]
    assert bare.decode(first.input_ids) == "You are chatting.\n\nUser: Hi\nAssistant: Hello.<|im_end|>"
    assert last.prompt_ids == context_ids(dialogue(every_answer=True).context, bare)


def test_a_text_is_learned_whole_but_for_the_first_token_of_a_row(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "one two three four five six seven"
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert len(ids) == 8
    rows = rows_of(Text(text=text), tokenizer, 3)
    assert [row.input_ids for row in rows] == [ids[:3], ids[3:6], ids[6:]]
    assert all(row.labels == [IGNORED, *row.input_ids[1:]] for row in rows)
    # A piece of one token would have nothing to learn.
    assert [row.input_ids for row in rows_of(Text(text=text), tokenizer, 7)] == [ids[:7]]
