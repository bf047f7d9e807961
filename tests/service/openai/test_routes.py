"""OpenAI's interface, by the real `openai` package over a real connection."""

import asyncio
import json
import time

import openai
import pytest
import torch

from petals_tune.service.users.keys import Keys
from tests.service.local import LOUD, PlainModel, running_service, wait_until

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def steps():
    return PlainModel()


@pytest.fixture(scope="module")
def service(steps):
    with running_service(steps) as running:
        yield running


@pytest.fixture(scope="module")
def client(service):
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def expected(service):
    """Greedy text of transformers' own generate."""
    tokenizer = service.tokenizer

    def text(prompt, count):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = service.steps.model.generate(
            ids, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=tokenizer.eos_token_id
        )
        return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    return text


def test_models_are_those_of_the_owner(client):
    assert [model.id for model in client.models.list()] == ["base", "loud"]
    assert client.models.retrieve("loud").created == 2


def test_completion_is_the_models_own_greedy_text(client, expected):
    prompt = "The first three planets are Mercury, Venus"
    answer = client.completions.create(model="base", prompt=prompt, max_tokens=8, temperature=0)
    assert answer.choices[0].text == expected(prompt, 8)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_chat_streamed_is_the_chat_whole(client):
    options = {"model": "base", "messages": QUESTION, "max_completion_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options)
    stream = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 3
    assert "".join(pieces) == whole.choices[0].message.content
    assert stream[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert stream[-1].usage == whole.usage


def test_an_adapter_is_a_model(client, service):
    answer = client.completions.create(model="loud", prompt="Hello", max_tokens=3, temperature=0)
    assert answer.choices[0].text == service.tokenizer.decode([LOUD] * 3)


def test_stop_texts_are_left_out(client, expected):
    prompt = "The first three planets are Mercury, Venus"
    text = expected(prompt, 12)
    stop = text[len(text) // 2 :][:3]
    answer = client.completions.create(model="base", prompt=prompt, max_tokens=12, temperature=0, stop=[stop])
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_n_answers_with_a_seed_come_again(client):
    options = {"model": "base", "messages": QUESTION, "max_tokens": 6, "n": 3, "seed": 5, "temperature": 1.5}
    first, second = (client.chat.completions.create(**options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]


def test_logprobs_are_the_models(client, service):
    prompt = "Hello"
    answer = client.chat.completions.create(
        model="base", messages=QUESTION, max_tokens=2, temperature=0, logprobs=True, top_logprobs=2
    )
    first = answer.choices[0].logprobs.content[0]
    assert first.logprob == first.top_logprobs[0].logprob > first.top_logprobs[1].logprob
    old = client.completions.create(model="base", prompt=prompt, max_tokens=1, temperature=0, logprobs=1)
    with torch.inference_mode():
        logits = service.steps.model(service.tokenizer(prompt, return_tensors="pt").input_ids).logits[0, -1]
    expected = logits.log_softmax(-1).max().item()
    assert old.choices[0].logprobs.token_logprobs == [pytest.approx(expected, abs=1e-5)]


def test_json_schema(client):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "old": {"type": "boolean"}},
        "required": ["city", "old"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="base",
        messages=QUESTION,
        max_tokens=60,
        seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    )
    assert json.loads(answer.choices[0].message.content).keys() == {"city", "old"}


def test_embeddings_are_unit_means_of_the_last_hidden_state(client, service):
    answer = client.embeddings.create(model="base", input=["Hello", "Hello there"])
    for text, each in zip(["Hello", "Hello there"], answer.data, strict=True):
        mean = service.steps.hidden(service.tokenizer(text).input_ids, None).mean(0)
        torch.testing.assert_close(torch.tensor(each.embedding), mean / mean.norm(), atol=1e-5, rtol=1e-5)
    assert answer.usage.prompt_tokens == 3


@pytest.mark.parametrize(
    ("change", "kind", "param"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "max_completion_tokens"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"extra_body": {"colour": "red"}}, openai.BadRequestError, "colour"),
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
def test_errors_name_the_field(client, change, kind, param):
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": "base", "messages": QUESTION, "max_tokens": 2, **change})
    assert caught.value.param == param


def test_thirty_two_at_once_with_mixed_adapters_async(service):
    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(
                *(
                    client.completions.create(
                        model=("base", "loud")[number % 2], prompt=f"Number {number}", max_tokens=3, temperature=0
                    )
                    for number in range(32)
                )
            )

    answers = asyncio.run(all_of_them())
    loud = service.tokenizer.decode([LOUD] * 3)
    assert all((answer.choices[0].text == loud) == bool(number % 2) for number, answer in enumerate(answers))
    assert service.steps.open_sessions == 0


def test_cancelling_frees_the_session(client, service):
    stream = client.chat.completions.create(
        model="base", messages=QUESTION, max_tokens=2000, temperature=0, stream=True
    )
    next(iter(stream))
    assert service.steps.open_sessions == 1
    stream.close()
    wait_until(lambda: service.steps.open_sessions == 0)
    before = service.steps.steps
    time.sleep(0.3)
    assert service.steps.steps == before


def test_keys_see_their_own_models(steps):
    keys = Keys(owners={Keys.digest("anna-0123456789abc"): "anna", Keys.digest("ben-0123456789abcd"): "ben"})
    with running_service(steps, keys=keys) as service:

        def client(key):
            return openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0)

        assert [model.id for model in client("ben-0123456789abcd").models.list()] == ["base", "loud", "bens"]
        assert [model.id for model in client("anna-0123456789abc").models.list()] == ["base", "loud"]
        with pytest.raises(openai.NotFoundError):
            client("anna-0123456789abc").completions.create(model="bens", prompt="x", max_tokens=1)
        with pytest.raises(openai.AuthenticationError):
            client("somebody-0123456789").models.list()


def test_more_than_a_key_may_have_is_429_with_a_time(steps):
    with running_service(steps, most_in_flight=1) as service:
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
        with client.completions.create(model="base", prompt="x", max_tokens=500, stream=True) as stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(model="base", prompt="x", max_tokens=1)
        assert int(caught.value.response.headers["Retry-After"]) >= 1
