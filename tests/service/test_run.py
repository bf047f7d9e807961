"""The whole service over a swarm: many users, adapters that come and go, servers that die, clients that leave."""

import asyncio
import importlib.util
import shutil
import threading
import time

import httpx
import openai
import pytest
import tinker

from petals_tune.service import adapter_folder
from petals_tune.service.run import has_tinker
from petals_tune.service.users.keys import Keys
from tests.processes import wait_until
from tests.service.swarm import NAME, Gate, save_adapter, serving

ANNA, BEN = "anna-0123456789abc", "ben-0123456789abcd"
KEYS = Keys(owners={Keys.digest(ANNA): "anna", Keys.digest(BEN): "ben"})
GREEDY = {"temperature": 0}
LONG = {"model": NAME, "prompt": "Hello", "max_tokens": 400, "temperature": 0, "logit_bias": {"0": -100}}  # never ends


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    """Adapters by their names as models."""
    place = tmp_path_factory.mktemp("adapters")
    return {
        NAME: None,
        "persona/monday": save_adapter(place / "persona" / "monday" / "adapter", folder, seed=1),
        "soft": save_adapter(place / "soft", folder, seed=2, kind="prompt"),
        "other": save_adapter(place / "other", folder, seed=3),
    }


def client_of(running, key="none", **options):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, **{"max_retries": 0, **options})


@pytest.fixture
def options(tmp_path):
    return [f"folder='{tmp_path}'"]


def test_thirty_two_at_once_with_mixed_adapters_say_what_each_model_says_alone(folder, plain, adapters, options):
    place = adapters["soft"].parent
    prompts = [f"Number {number}" for number in range(32)]
    names = [list(adapters)[number % 4] for number in range(32)]
    expected = [plain.text(prompt, 8, adapters[name]) for prompt, name in zip(prompts, names, strict=True)]
    assert len(set(expected)) > 8

    async def all_of_them(url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

            async def one(number):
                asked = {"model": names[number], "prompt": prompts[number], "max_tokens": 8, **GREEDY}
                if number % 3:
                    return (await client.completions.create(**asked)).choices[0].text
                return "".join([c.choices[0].text async for c in await client.completions.create(**asked, stream=True)])

            assert {model.id async for model in client.models.list()} == adapters.keys()
            return await asyncio.gather(*map(one, range(32)))

    with serving(folder, f"adapters='{place}'", "most_at_once=8", *options) as running:
        assert asyncio.run(all_of_them(running.url)) == expected
        assert [running.swarm.sessions(number) for number in (1, 2)] == [0, 0]


def test_adapters_come_change_and_go_and_an_answer_keeps_the_one_that_it_began_with(
    folder, plain, adapters, options, tmp_path, monkeypatch
):
    monkeypatch.setattr(adapter_folder, "LOOK_S", 0.05)
    place = tmp_path / "adapters"
    place.mkdir()
    asked = {"model": "mine", "prompt": "Hello there", "max_tokens": 20, **GREEDY}
    first, second = (plain.text("Hello there", 20, adapters[name]) for name in ("persona/monday", "other"))
    assert first != second
    gate = Gate(monkeypatch, step=4)
    with serving(folder, f"adapters='{place}'", *options) as running:
        client = client_of(running)

        def models():
            return [model.id for model in client.models.list()]

        assert models() == [NAME]
        (place / "mine").mkdir()
        shutil.copy(adapters["other"] / "adapter_config.json", place / "mine")  # unfinished
        time.sleep(0.2)
        assert models() == [NAME]
        shutil.copytree(adapters["persona/monday"], place / "mine", dirs_exist_ok=True)
        wait_until(lambda: models() == [NAME, "mine"], "the adapter is offered")
        stream = client.completions.create(**asked, stream=True)
        assert gate.held.wait(30)
        shutil.copytree(adapters["other"], place / "mine", dirs_exist_ok=True)
        wait_until(lambda: client.completions.create(**asked).choices[0].text == second, "the adapter is replaced")
        shutil.rmtree(place / "mine")
        wait_until(lambda: models() == [NAME], "the adapter is gone")
        with pytest.raises(openai.NotFoundError):
            client.completions.create(**asked)
        gate.open()
        assert "".join(chunk.choices[0].text for chunk in stream) == first


def test_a_server_that_dies_in_the_middle_of_a_stream_is_not_seen(folder, plain, options, monkeypatch):
    expected, gate = plain.text("Hello there", 30), Gate(monkeypatch, step=10)
    with serving(folder, *options, spans=("0:1", "1:2", "1:2")) as running:
        stats = running.model.remote_blocks.stats
        stream = client_of(running).completions.create(
            model=NAME, prompt="Hello there", max_tokens=30, temperature=0, stream=True
        )
        assert gate.held.wait(30)
        (used,) = [number for number in (2, 3) if running.swarm.sessions(number)]
        assert stats.retries == 0
        running.swarm.kill(used)
        gate.open()
        assert "".join(chunk.choices[0].text for chunk in stream) == expected
        assert stats.retries > 0, "the fault was felt"


def test_a_stream_that_its_client_closes_frees_its_session(folder, options):
    with serving(folder, *options) as running:
        stream = client_of(running).completions.create(**LONG, stream=True, n=2)
        next(iter(stream))
        wait_until(lambda: running.swarm.sessions(1) == 2, "two sessions are open")
        stream.close()
        wait_until(lambda: not running.swarm.sessions(1) and not running.swarm.sessions(2), "the sessions are closed")
        assert not running.core.fairness.busy


def test_a_client_that_leaves_before_its_answer_is_whole_frees_its_session(folder, options):
    with serving(folder, *options) as running:

        def ask():
            with pytest.raises(openai.APITimeoutError):
                client_of(running, timeout=0.3).completions.create(**LONG)

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: running.swarm.sessions(1) == 1, "a session is open")
        asking.join()
        wait_until(lambda: not running.swarm.sessions(1) and not running.swarm.sessions(2), "the sessions are closed")
        wait_until(lambda: not running.core.fairness.busy, "nothing is in flight")


def test_one_key_with_long_answers_does_not_keep_another_one_waiting(folder, plain, options):
    with serving(folder, "most_at_once=2", *options, keys=KEYS) as running:
        anna, ben = client_of(running, ANNA), client_of(running, BEN)
        long = {**LONG, "max_tokens": 60}
        streams = [iter(anna.completions.create(**long, stream=True)) for _ in range(2)]
        for stream in streams:
            next(stream)
        held = client_of(running, ANNA, timeout=60)
        waiting = threading.Thread(target=lambda: held.completions.create(**long))
        waiting.start()
        wait_until(lambda: running.core.fairness.slots.waiting("anna") == 1, "an answer waits")
        answer = ben.completions.create(model=NAME, prompt="Hello", max_tokens=6, **GREEDY)
        assert answer.choices[0].text == plain.text("Hello", 6)
        assert running.core.fairness.slots.waiting("anna"), "all of anna's answers are still made, or wait"
        lengths = [1 + len(list(stream)) for stream in streams]
        assert lengths == [lengths[0]] * 2, "an answer that had to wait is the same"
        waiting.join()


def test_too_many_are_429_and_the_client_comes_again_by_itself(folder, options):
    with serving(folder, "most_at_once=1", "most_waiting=1", "requests_a_key=3", *options, keys=KEYS) as running:
        with client_of(running, ANNA).completions.create(**LONG, stream=True) as stream:
            next(iter(stream))
            waiting = threading.Thread(
                target=lambda: client_of(running, ANNA).completions.create(**{**LONG, "max_tokens": 2})
            )
            waiting.start()
            wait_until(lambda: running.core.fairness.slots.waiting() == 1, "an answer waits")
            with pytest.raises(openai.RateLimitError) as caught:
                client_of(running, ANNA).completions.create(**LONG)
            assert int(caught.value.response.headers["Retry-After"]) >= 1
            with pytest.raises(openai.RateLimitError):
                client_of(running, ANNA).completions.create(**LONG, n=2)
            # Another key is let in, though the queue is full.
            client_of(running, BEN).completions.create(**{**LONG, "max_tokens": 2})
        waiting.join()
        done = []
        with client_of(running, ANNA).completions.create(**LONG, n=3, stream=True) as stream:
            next(iter(stream))
            again = threading.Thread(
                target=lambda: done.append(
                    client_of(running, ANNA, max_retries=5).completions.create(**{**LONG, "max_tokens": 2})
                )
            )
            again.start()
            refused = 'petals_tune_service_responses_total{interface="openai",status="429"}'
            before = value_of(running, refused)
            wait_until(lambda: value_of(running, refused) > before, "a request is refused")
        again.join()
        assert done[0].usage.completion_tokens == 2


def test_what_trains_does_not_keep_chats_waiting(folder, options):
    """It holds more threads than asyncio has by itself."""
    with serving(folder, "most_at_once=40", *options) as running:
        trains, ended = threading.Barrier(41), threading.Event()

        def train():
            trains.wait(60)
            ended.wait(60)

        async def train_all():
            await asyncio.gather(*(asyncio.to_thread(train) for _ in range(40)))

        training = asyncio.run_coroutine_threadsafe(train_all(), running.loop)
        trains.wait(60)
        turns = [{"role": "user", "content": "Hi"}]
        answer = client_of(running).chat.completions.create(model=NAME, messages=turns, max_tokens=2)
        assert answer.usage.completion_tokens
        ended.set()
        training.result(60)


def test_tinkers_client_comes_again_too(folder, plain, options, monkeypatch):
    prompt, gate = plain.tokenizer("Hello").input_ids, Gate(monkeypatch, step=2)
    expected = plain.tokens(prompt, 5)
    with serving(folder, "requests_a_key=2", *options) as running:
        service = tinker.ServiceClient(base_url=running.url, api_key="tml-0123456789abcdef")
        sampler = service.create_sampling_client(base_model=NAME)
        parameters = tinker.SamplingParams(max_tokens=5, temperature=0)

        def ask():
            return sampler.sample(tinker.ModelInput.from_ints(prompt), num_samples=2, sampling_params=parameters)

        asked = [ask()]
        assert gate.held.wait(30)
        asked.append(ask())
        refused = 'petals_tune_service_responses_total{interface="tinker",status="429"}'
        wait_until(lambda: value_of(running, refused) > 0, "a sample is refused")
        gate.open()
        found = [sequence.tokens for future in asked for sequence in future.result(60).sequences]
        assert found == [expected] * 4
        assert (
            value_of(running, f'petals_tune_service_tokens_total{{interface="tinker",kind="written",model="{NAME}"}}')
            == 20
        )


def value_of(running, name):
    lines = httpx.get(f"{running.url}/metrics", headers={"Authorization": f"Bearer {ANNA}"}).text.splitlines()
    return float(next((line.split()[-1] for line in lines if line.startswith(name)), 0))


def test_metrics_count_by_model_and_need_a_key(folder, options):
    with serving(folder, *options, keys=KEYS) as running:
        client_of(running, ANNA).completions.create(**{**LONG, "max_tokens": 7})
        labels = f'{{interface="openai",kind="written",model="{NAME}"}}'
        assert value_of(running, f"petals_tune_service_tokens_total{labels}") == 7
        assert value_of(running, "petals_tune_service_first_token_seconds_count") == 1
        assert value_of(running, "petals_tune_service_waiting") == 0
        assert value_of(running, "petals_tune_service_in_flight") == 0
        assert httpx.get(f"{running.url}/metrics").status_code == 401
        text = httpx.get(f"{running.url}/metrics", headers={"X-API-Key": BEN}).text
        assert "anna" not in text


def test_the_sdk_without_the_rest_of_its_extra_is_no_interface(monkeypatch, caplog):
    """A client on this machine may have it; then the service starts, and says what is missing."""
    assert has_tinker()
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyrage" else found(name))
    with caplog.at_level("INFO"):
        assert not has_tinker()
    assert "pyrage" in caplog.text
