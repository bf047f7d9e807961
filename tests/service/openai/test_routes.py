"""OpenAI's interface, by the real `openai` package, over a swarm in this process."""

import asyncio
import base64
import json

import numpy as np
import openai
import pytest
import torch

from petals_tune.service.users.keys import Keys
from tests.service.swarm import NAME, save_adapter, serving

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PROMPT = "Hello there"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Oslo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "old": {"type": "boolean"}},
    "required": ["city", "old"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapters") / "persona", folder, seed=1)


@pytest.fixture(scope="module")
def running(folder, adapter, tmp_path_factory):
    place = tmp_path_factory.mktemp("service")
    with serving(folder, f"adapters='{adapter.parent}'", f"folder='{place}'") as running:
        yield running


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def complete(client):
    def complete(**options):
        return client.completions.create(**{"model": NAME, "prompt": PROMPT, "temperature": 0, **options})

    return complete


@pytest.fixture(scope="module")
def chat(client):
    def chat(**options):
        return client.chat.completions.create(**{"model": NAME, "messages": QUESTION, "temperature": 0, **options})

    return chat


def content_of(stream):
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_models_are_the_base_model_and_its_adapters(client):
    assert [model.id for model in client.models.list()] == [NAME, "persona"]
    assert client.models.retrieve("persona").object == "model"


@pytest.mark.parametrize("model", [NAME, "persona"])
def test_a_completion_is_the_models_own_greedy_text(complete, plain, adapter, model):
    answer = complete(model=model, max_tokens=8)
    assert answer.choices[0].text == plain.text(PROMPT, 8, adapter if model == "persona" else None)
    assert answer.choices[0].finish_reason == "length"
    prompt_tokens = len(plain.tokenizer(PROMPT).input_ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt_tokens, 8)


def test_prompts_may_be_several_and_token_ids(complete, plain):
    ids = plain.tokenizer(PROMPT).input_ids
    answer = complete(prompt=[PROMPT, "Goodbye"], max_tokens=5)
    assert [choice.text for choice in answer.choices] == [plain.text(PROMPT, 5), plain.text("Goodbye", 5)]
    assert complete(prompt=ids, max_tokens=5).choices[0].text == plain.text(PROMPT, 5)
    assert complete(prompt=[ids], max_tokens=5).choices[0].text == plain.text(PROMPT, 5)


def test_a_chat_is_what_the_model_says_behind_its_template(chat, plain):
    prompt = f"<|system|>Be brief.<|user|>{QUESTION[0]['content']}<|assistant|>"
    turns = [{"role": "developer", "content": "Be brief."}, *QUESTION]
    answer = chat(messages=turns, max_completion_tokens=8)
    assert answer.choices[0].message.content == plain.text(prompt, 8)


def test_a_chat_streamed_is_the_chat_whole(chat):
    whole = chat(max_completion_tokens=30, seed=3, temperature=1, n=2)
    stream = list(
        chat(max_completion_tokens=30, seed=3, temperature=1, n=2, stream=True, stream_options={"include_usage": True})
    )
    for number, choice in enumerate(whole.choices):
        own = [chunk for chunk in stream if chunk.choices and chunk.choices[0].index == number]
        assert content_of(own) == choice.message.content
        assert own[0].choices[0].delta.role == "assistant"
        assert own[-1].choices[0].finish_reason == choice.finish_reason
    assert stream[-1].usage == whole.usage


def test_async_streams(running, plain):
    async def text():
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.completions.create(
                model=NAME, prompt=PROMPT, max_tokens=9, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

    assert asyncio.run(text()) == plain.text(PROMPT, 9)


def test_stop_texts_are_left_out(complete, plain):
    text = plain.text(PROMPT, 12)
    stop = text[3:5]
    answer = complete(max_tokens=12, stop=[stop])
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_answers_with_a_seed_come_again_and_each_is_as_it_would_be_alone(chat):
    options = {"max_tokens": 6, "temperature": 1}
    together = [choice.message.content for choice in chat(**options, n=3, seed=5).choices]
    alone = [chat(**options, seed=5 + number).choices[0].message.content for number in range(3)]
    assert together == alone
    assert len(set(together)) == 3


def test_a_bias_decides(complete, plain):
    (token,) = plain.tokenizer("x").input_ids
    assert complete(max_tokens=3, logit_bias={str(token): 100}).choices[0].text == "xxx"


def test_logprobs_are_the_models(chat, complete, plain):
    with torch.inference_mode():
        ids = plain.tokenizer(PROMPT, return_tensors="pt").input_ids
        expected = plain.model()(ids).logits[0].log_softmax(-1)
    found = complete(max_tokens=2, logprobs=2).choices[0].logprobs
    assert found.token_logprobs[0] == pytest.approx(expected[-1].max().item(), abs=1e-4)
    assert sorted(found.top_logprobs[0].values(), reverse=True) == pytest.approx(
        expected[-1].topk(2).values.tolist(), abs=1e-4
    )
    assert found.text_offset[0] == len(PROMPT)
    first = chat(max_tokens=2, logprobs=True, top_logprobs=2).choices[0].logprobs.content[0]
    assert first.logprob == first.top_logprobs[0].logprob > first.top_logprobs[1].logprob


@pytest.mark.parametrize("count", [0, 3])
def test_a_prompt_may_be_echoed_with_its_logprobs(complete, plain, count):
    ids = plain.tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        logprobs = plain.model()(ids).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, ids[0, 1:, None]).flatten().tolist()
    answer = complete(max_tokens=count, echo=True, logprobs=1)
    found = answer.choices[0].logprobs
    assert answer.choices[0].text == PROMPT + (plain.text(PROMPT, count) if count else "")
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1 : ids.shape[1]] == pytest.approx(expected, abs=1e-4)
    assert len(found.tokens) == len(found.text_offset) == ids.shape[1] + count
    assert found.text_offset[:3] == [0, 1, 2]
    assert answer.usage.completion_tokens == count


@pytest.mark.parametrize("stream", [False, True])
def test_json_of_a_schema(chat, stream):
    format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    answer = chat(max_tokens=90, temperature=1, seed=1, response_format=format, stream=stream)
    text = content_of(answer) if stream else answer.choices[0].message.content
    assert json.loads(text).keys() == {"city", "old"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_is_called_where_it_has_to_be(chat, choice):
    options = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 150, "parallel_tool_calls": False}
    answer = chat(**options).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    stream = list(chat(**options, stream=True))
    (delta,) = [chunk.choices[0].delta.tool_calls for chunk in stream if chunk.choices[0].delta.tool_calls]
    assert delta[0].function.arguments == call.function.arguments
    assert stream[-1].choices[0].finish_reason == "tool_calls"


def test_embeddings_are_unit_means_of_the_last_hidden_state(client, plain):
    answer = client.embeddings.create(model=NAME, input=["Hello", PROMPT], encoding_format="float")
    packed = client.embeddings.create(model=NAME, input=["Hello", PROMPT], encoding_format="base64")
    for text, each, bytes in zip(["Hello", PROMPT], answer.data, packed.data, strict=True):
        ids = plain.tokenizer(text, return_tensors="pt").input_ids
        with torch.inference_mode():
            mean = plain.model()(ids, output_hidden_states=True).hidden_states[-1][0].mean(0)
        torch.testing.assert_close(torch.tensor(each.embedding), mean / mean.norm(), atol=1e-5, rtol=1e-5)
        assert np.frombuffer(base64.b64decode(bytes.embedding), np.float32).tolist() == pytest.approx(each.embedding)
    assert answer.usage.prompt_tokens == len(plain.tokenizer("Hello").input_ids) + len(
        plain.tokenizer(PROMPT).input_ids
    )


@pytest.mark.parametrize(
    ("change", "kind", "param"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "max_completion_tokens"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"extra_body": {"colour": "red"}}, openai.BadRequestError, "colour"),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs"),
        ({"logit_bias": {"999999": 1}}, openai.BadRequestError, "logit_bias"),
        ({"logit_bias": {"999999": 1}, "stream": True}, openai.BadRequestError, "logit_bias"),
        ({"response_format": {"type": "json_schema"}}, openai.BadRequestError, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}}},
            openai.BadRequestError,
            "response_format",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            openai.BadRequestError,
            "messages",
        ),
    ],
)
def test_errors_name_the_field(chat, change, kind, param):
    with pytest.raises(kind) as caught:
        chat(**{"max_tokens": 2, **change})
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": "x" * 10**6}, "prompt"),
        ({"prompt": ["x"] * 65, "n": 2}, "prompt"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"prompt": ["a", "b"], "stream": True}, "stream"),
        ({"echo": True, "stream": True}, "stream"),
    ],
)
def test_errors_of_completions_name_the_field(complete, change, param):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(**{"max_tokens": 2, **change})
    assert caught.value.param == param


def test_a_text_that_is_too_long_is_not_embedded(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=NAME, input=[[5] * 3000])
    assert caught.value.param == "input"


def test_a_key_that_is_not_known_is_an_authentication_error(folder, tmp_path):
    keys = Keys(owners={Keys.digest("anna-0123456789abc"): "anna"})
    with serving(folder, f"folder='{tmp_path}'", keys=keys) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="somebody-0123456789", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        assert [model.id for model in client.with_options(api_key="anna-0123456789abc").models.list()] == [NAME]
