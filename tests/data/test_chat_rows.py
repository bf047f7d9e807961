"""Any chat of eight published chat templates, for five kinds of tokenizers: what is learned is what would be said."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from petals_tune.data.chat_format import Tools
from petals_tune.data.chat_rows import IGNORED, Row, chat_rows
from petals_tune.data.examples import Chat, Message
from petals_tune.data.rows import context_ids
from petals_tune.errors import DataError
from tests.data.kinds import KINDS, WORDS
from tests.raising import raises

# ruff: noqa: RUF001  # DeepSeek's tokens have wide bars

# Of the package trl; each with what ends an answer. gemma refuses system turns, qwen3 drops reasoning, and phi3_5 ends
# a whole chat with <|endoftext|>. gptoss ends the last answer with <|return|> and those before it with <|end|>.
ENDS = {
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "gemma": "<end_of_turn>",
    "gptoss": "<|return|>",
    "llama3": "<|eot_id|>",
    "phi3_5": "<|end|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>",
}
_SPECIAL = re.compile(r"<\|[\w:]+\|>|<｜[^｜']+｜>|<[a-z]+_of_turn>|<bos>|</?think>")


def template(name: str) -> str:
    spec = importlib.util.find_spec("trl")  # not imported: that takes seconds
    assert spec is not None
    assert spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def tokenizer_of(kind: str, name: str) -> PreTrainedTokenizerBase:
    text = template(name)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), bos_token="<s>", eos_token=ENDS[name])
    tokenizer.add_special_tokens({"additional_special_tokens": sorted({*_SPECIAL.findall(text), ENDS[name]})})
    tokenizer.chat_template = text
    return tokenizer


def learned(row: Row) -> list[tuple[int, int]]:
    """(first, end) of each run of supervised tokens."""
    marks = [False, *(label != IGNORED for label in row.labels), False]
    edges = [place for place, (a, b) in enumerate(pairwise(marks)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


TEXTS = st.lists(st.sampled_from([*WORDS, "é", "世界", "\n", "  ", "1"]), min_size=1, max_size=4).map(" ".join)
TEXTS = TEXTS.filter(lambda text: text.strip())


@st.composite
def chats(draw: st.DrawFn) -> Chat:
    turns = draw(st.integers(1, 3))
    messages: list[Message] = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for _ in range(turns):
        messages.append({"role": "user", "content": draw(TEXTS)})
        messages.append({"role": "assistant", "content": draw(TEXTS)})
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    some = draw(st.lists(st.sampled_from(answers), min_size=1, unique=True))
    return Chat(messages=tuple(messages[: max(some) + 1]), learned=tuple(sorted(some)))


TOOLS = ({"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}},)

# What ends a call of a tool, in the templates that write calls.
CALL_ENDS = {name: ENDS[name] for name in ("deepseekv3", "qwen2_5", "qwen3", "qwen3_5_think")} | {"gptoss": "<|call|>"}


@st.composite
def tool_chats(draw: st.DrawFn) -> Chat:
    """Chats in which the assistant calls a tool before some of its answers."""
    messages: list[Message] = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for called in (True, *draw(st.lists(st.booleans(), max_size=1))):
        messages.append({"role": "user", "content": draw(TEXTS)})
        if called:
            call = {"name": "weather", "arguments": {"city": draw(st.sampled_from(WORDS))}}
            messages.append(
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
            )
            messages.append({"role": "tool", "content": draw(TEXTS)})
        messages.append({"role": "assistant", "content": draw(TEXTS)})
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    some = draw(st.lists(st.sampled_from(answers), min_size=1, unique=True))
    return Chat(messages=tuple(messages[: max(some) + 1]), learned=tuple(sorted(some)), tools=TOOLS)


def sent(
    messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerBase, name: str, tools: Tools = ()
) -> tuple[int, ...]:
    """What generation sends for the next answer, by transformers alone."""
    turns = [{**m, "content": m["content"].strip()} if m["role"] == "assistant" else m for m in messages]
    if name == "gemma" and turns[0]["role"] == "system":
        system, user, *rest = turns
        turns = [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]
    if name == "deepseekv3":  # whose template takes the arguments of calls as text
        turns = copy.deepcopy(turns)
        for call in (call["function"] for turn in turns for call in turn.get("tool_calls", ())):
            call["arguments"] = json.dumps(call["arguments"])
    encoded = tokenizer.apply_chat_template(
        turns, tools=list(tools) or None, add_generation_prompt=True, return_dict=True
    )
    return tuple(encoded["input_ids"])


def written(text: str, kind: str) -> str:
    """A text as tokens of that kind hold it."""
    return re.sub(r"\s", "", text) if kind == "word pieces" else text


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4, deadline=None)
@given(chat=chats())
def test_before_every_learned_answer_stands_what_generation_would_have_sent(kind: str, name: str, chat: Chat) -> None:
    tokenizer = tokenizer_of(kind, name)
    prompts = {sent(chat.messages[:place], tokenizer, name): place for place in chat.learned}
    assert [*prompts] == [tuple(context_ids(chat.messages[:place], tokenizer)) for place in chat.learned]
    places = []
    for row in chat_rows(chat, tokenizer, 4000, from_user=False):
        for start, end in learned(row):
            place = prompts[tuple(row.input_ids[:start])]
            assert row.input_ids[end - 1] == tokenizer.convert_tokens_to_ids(ENDS[name])
            said = written(str(tokenizer.decode(row.input_ids[start : end - 1])), kind)
            answer = written(chat.messages[place]["content"].strip(), kind)
            assert said.endswith(answer)
            before = said.removesuffix(answer).strip()
            assert re.fullmatch(r"(<think>)?\s*(</think>)?|<\|channel\|>\s?final<\|message\|>", before)
            places.append(place)
    assert sorted(places) == list(chat.learned), "each answer once"


@pytest.mark.parametrize("name", CALL_ENDS)
@settings(max_examples=12, deadline=None)
@given(chat=tool_chats(), kind=st.sampled_from([*KINDS]))
def test_calls_of_tools_and_answers_after_their_results_follow_what_generation_would_have_sent(
    name: str, chat: Chat, kind: str
) -> None:
    # DeepSeek's template writes a second call of a chat without the mark of the turn: that is refused.
    assume(name != "deepseekv3" or sum("tool_calls" in turn for turn in chat.messages) == 1)
    tokenizer = tokenizer_of(kind, name)
    prompts = {sent(chat.messages[:place], tokenizer, name, TOOLS): place for place in chat.learned}
    places = []
    for row in chat_rows(chat, tokenizer, 4000, from_user=False):
        for start, end in learned(row):
            place = prompts[tuple(row.input_ids[:start])]
            turn = chat.messages[place]
            said = written(str(tokenizer.decode(row.input_ids[start : end - 1])), kind)
            last = ENDS[name] if not turn.get("tool_calls") else CALL_ENDS[name]
            assert row.input_ids[end - 1] == tokenizer.convert_tokens_to_ids(last)
            if turn.get("tool_calls"):
                assert "weather" in said
                assert turn["tool_calls"][0]["function"]["arguments"]["city"] in said
            else:
                assert said.endswith(written(turn["content"].strip(), kind))
            places.append(place)
    assert sorted(places) == list(chat.learned), "each call and each answer once"


@settings(max_examples=30, deadline=None)
@given(chat=chats(), kind=st.sampled_from([*KINDS]), name=st.sampled_from([*ENDS]), max_tokens=st.integers(8, 120))
def test_a_short_row_loses_its_oldest_turns_and_no_more(kind: str, name: str, chat: Chat, max_tokens: int) -> None:
    tokenizer = tokenizer_of(kind, name)
    head = chat.messages[:1] if chat.messages[0]["role"] == "system" else ()
    contexts: dict[tuple[int, ...], int] = {}  # each that generation might send -> the position of the answer
    for place in chat.learned:
        for start in range(len(head), place, 2):
            contexts[sent((*head, *chat.messages[start:place]), tokenizer, name)] = place
    rows = list(chat_rows(chat, tokenizer, max_tokens, from_user=False))
    places = [contexts[tuple(row.input_ids[:start])] for row in rows for start, _ in learned(row)]
    assert len(places) == len(set(places)), "no answer twice"
    assert all(len(row.input_ids) <= max_tokens for row in rows)
    for place in {*chat.learned} - {*places}:
        (row,) = chat_rows(
            Chat(messages=(*head, *chat.messages[place - 1 : place + 1]), learned=(len(head) + 1,)),
            tokenizer,
            4000,
            from_user=False,
        )
        assert len(row.input_ids) > max_tokens, "too long even alone with its question"


THREE: tuple[Message, ...] = (
    {"role": "user", "content": "What is it ?"},
    {"role": "assistant", "content": "tea"},
    {"role": "user", "content": "hot ?"},
    {"role": "assistant", "content": "The end"},
)


@pytest.mark.parametrize(("name", "rows"), [("qwen3", 1), ("llama3", 1), ("phi3_5", 1), ("gptoss", 2)])
def test_answers_share_a_row_where_they_end_as_generation_would_end_them(name: str, rows: int) -> None:
    found = list(
        chat_rows(Chat(messages=THREE, learned=(1, 3)), tokenizer_of("byte level", name), 400, from_user=False)
    )
    assert len(found) == rows


def test_an_answer_whose_reasoning_the_whole_chat_leaves_out_has_a_row_of_its_own() -> None:
    tokenizer = tokenizer_of("byte level", "qwen3")
    reasons = {"role": "assistant", "content": "<think>\nParis .\n</think>\n\ntea"}
    messages = (THREE[0], reasons, *THREE[2:])
    last, first = chat_rows(Chat(messages=messages, learned=(1, 3)), tokenizer, 400, from_user=False)
    ((start, end),) = learned(first)
    assert tokenizer.decode(first.input_ids[start:end]) == "<think>\nParis .\n</think>\n\ntea<|im_end|>"
    assert "Paris" not in str(tokenizer.decode(last.input_ids))


def test_answers_that_a_short_row_has_no_place_for_have_rows_of_their_own() -> None:
    tokenizer = tokenizer_of("byte level", "qwen2_5")
    chat = Chat(messages=THREE, learned=(1, 3))
    (whole,) = chat_rows(chat, tokenizer, 400, from_user=False)
    last, first = chat_rows(chat, tokenizer, len(whole.input_ids) - 1, from_user=False)
    assert [len(learned(row)) for row in (last, first)] == [1, 1]
    assert last.cut_tokens == len(whole.input_ids) - len(last.input_ids)
    assert list(chat_rows(chat, tokenizer, 5, from_user=False)) == []


def test_an_assistant_that_speaks_first_keeps_its_place_where_the_template_has_one() -> None:
    chat = Chat(messages=(THREE[1], *THREE[2:]), learned=(0, 2))
    tokenizer = tokenizer_of("byte level", "qwen2_5")
    (row,) = chat_rows(chat, tokenizer, 400, from_user=False)
    assert "tea" in str(tokenizer.decode(row.input_ids))
    assert len(learned(row)) == 1, "nobody asked for the first"
    (without,) = chat_rows(Chat(messages=chat.messages, learned=(2,)), tokenizer, 400, from_user=True)
    assert "tea" not in str(tokenizer.decode(without.input_ids))


def test_a_word_that_is_in_the_end_of_the_turn_is_found_where_it_is_the_answer() -> None:
    tokenizer = tokenizer_of("byte level", "qwen2_5")
    messages = ({"role": "user", "content": "What ?"}, {"role": "assistant", "content": "im_end"})
    (row,) = chat_rows(Chat(messages=messages, learned=(1,)), tokenizer, 400, from_user=False)
    ((start, end),) = learned(row)
    assert tokenizer.decode(row.input_ids[start:end]) == "im_end<|im_end|>"


def test_tool_calls_are_learned_as_the_template_writes_them() -> None:
    tokenizer = tokenizer_of("byte level", "qwen2_5")
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    tools = ({"type": "function", "function": {"name": "weather", "parameters": {}}},)
    messages = (THREE[0], {"role": "assistant", "content": "", "tool_calls": [call]})
    (row,) = chat_rows(Chat(messages=messages, learned=(1,), tools=tools), tokenizer, 4000, from_user=False)
    ((start, end),) = learned(row)
    said = str(tokenizer.decode(row.input_ids[start:end]))
    assert '"city": "Paris"' in said
    assert said.endswith("<|im_end|>")
    assert '"name": "weather", "parameters"' in str(tokenizer.decode(row.input_ids[:start]))


def test_an_empty_answer_is_refused() -> None:
    messages = (THREE[0], {"role": "assistant", "content": " "})
    with raises(DataError, reason="an empty answer"):
        list(chat_rows(Chat(messages=messages, learned=(1,)), tokenizer_of("prepend", "gemma"), 400, from_user=False))


def test_the_end_of_a_turn_is_learned_with_the_space_that_the_template_puts_before_it() -> None:
    tokenizer = tokenizer_of("metaspace", "phi3_5")  # a tokenizer whose end token is another one than the template's
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else "
        "' ' + m.content + ' <|assistant|>' }}{% endfor %}"
    )  # as Llama 2's
    (row,) = chat_rows(Chat(messages=THREE, learned=(1, 3)), tokenizer, 400, from_user=False)
    answers = [str(tokenizer.decode(row.input_ids[start:end])) for start, end in learned(row)]
    assert [answer.split() for answer in answers] == [["tea", "<|assistant|>"], ["The", "end", "<|assistant|>"]]


def test_turns_that_the_template_refuses_are_refused_and_not_left_out() -> None:
    twice = (THREE[0], *THREE[2:])
    with raises(DataError, reason="turns that the chat template refuses"):
        list(
            chat_rows(
                Chat(messages=(THREE[0], *twice), learned=(3,)), tokenizer_of("prepend", "gemma"), 400, from_user=False
            )
        )


def test_a_long_chat_in_short_rows_is_rendered_a_few_times_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = copy.copy(tokenizer_of("byte level", "llama3"))
    messages = tuple(THREE[number % 4] for number in range(200))
    calls: list[int] = []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda turns, **kw: calls.append(1) or render(turns, **kw))
    rows = list(chat_rows(Chat(messages=messages, learned=tuple(range(1, 200, 2))), tokenizer, 200, from_user=True))
    assert sum(len(learned(row)) for row in rows) == 100
    assert len(calls) < 100 * len(rows), "and not a hundred times for each of a hundred answers"


def test_a_tokenizer_in_python_that_appends_an_end_token_puts_none_before_the_answer() -> None:
    tokenizer = ByT5Tokenizer()
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    for text in (None, template("qwen2_5")):
        tokenizer.chat_template = text
        for row in chat_rows(Chat(messages=THREE, learned=(1, 3)), tokenizer, 4000, from_user=False):
            ((start, end),) = learned(row)
            assert tokenizer.eos_token_id not in row.input_ids[:start]
            assert row.input_ids[end - 1 :] == [tokenizer.eos_token_id]
