from itertools import islice

import pytest
from transformers import PreTrainedTokenizerBase

from petals_tune.data.chitchat import ChitChat
from petals_tune.data.rows import IGNORED, Example, LabelledText, Message, Row, encode, fit
from petals_tune.errors import DataError

SYSTEM: Message = {"role": "system", "content": "You are chatting."}


def chat(*turns: str, answer: str = "Fine, thanks!", system: bool = True) -> Example:
    """Turns of user and assistant in alternation, the last one the user's."""
    roles = ["user", "assistant"] if len(turns) % 2 else ["assistant", "user"]
    messages = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return Example(context=(*([SYSTEM] if system else []), *messages), answer=answer)


def learned(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != IGNORED]))


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
    assert fit(example, tokenizer, length - 1) is None
    with pytest.raises(DataError, match=f"does not fit into {length - 1} tokens"):
        encode(example, tokenizer, max_tokens=length - 1)


@pytest.mark.parametrize("answer", ["", "  \n"])
def test_an_empty_answer_is_an_error(tokenizer: PreTrainedTokenizerBase, answer: str) -> None:
    with pytest.raises(DataError, match="empty answer"):
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
    with pytest.raises(DataError, match="refuses the turns system, user: System role not supported"):
        encode(chat("Hi"), bare, max_tokens=100)


def test_a_template_that_rewrites_the_prompt_is_a_data_error(bare: PreTrainedTokenizerBase) -> None:
    bare.chat_template = "{{ messages | length }} turns"
    with pytest.raises(DataError, match="no place for an answer"):
        encode(chat("Hi"), bare, max_tokens=100)


def test_a_label_word_is_the_one_learned_token_at_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    row = encode(LabelledText(prompt="Review: good .\nSentiment:", word=" positive"), tokenizer, max_tokens=20)
    assert tokenizer.decode(row.input_ids) == "Review: good .\nSentiment: positive"
    assert row.supervised_tokens == 1
    assert row.labels[-1] == row.input_ids[-1] == tokenizer.convert_tokens_to_ids("Ġpositive")


def test_a_label_word_of_several_tokens_is_named_with_its_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"label word ' unputdownable' is \d tokens .*must be one"):
        encode(LabelledText(prompt="Review: good .\nSentiment:", word=" unputdownable"), tokenizer, max_tokens=50)


def test_real_rows_keep_the_mask_rule(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [row for example in islice(ChitChat().train(), 100) if (row := fit(example, tokenizer, 112))]
    assert len(rows) > 50
    for row in rows:
        start = len(row.prompt_ids)
        assert len(row.input_ids) <= 112
        assert row.labels == [IGNORED] * start + row.input_ids[start:]
        assert row.input_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row.prompt_ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
