"""Sampling sessions come and go: what is loaded, what expires, and what is forgotten."""

import time

import httpx
import pytest
import tinker
from tinker import types

from petals_tune.service.tinker.records import CheckpointRecord, SessionRecord
from petals_tune.service.tinker.routes import Limits
from tests.service.tinker.tiny import ADAM, DATA, KEY, NAME, running_tinker, tiny_swarm

PROMPT, PARAMS = types.ModelInput.from_ints([3, 9, 4]), types.SamplingParams(max_tokens=3, temperature=0)


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    with tiny_swarm(tmp_path_factory.mktemp("model") / "llama") as swarm:
        yield swarm


@pytest.fixture
def running(swarm, tmp_path):
    with running_tinker(tmp_path, swarm.model, limits=Limits(samplers_in_memory=1)) as running:
        yield running


@pytest.fixture
def service(running):
    with running.client() as service:
        yield service


@pytest.fixture
def training(service):
    return service.create_lora_training_client(base_model=NAME, rank=4, seed=5).result()


def sampled(sampler):
    return sampler.sample(PROMPT, 1, PARAMS, include_prompt_logprobs=True).result().prompt_logprobs[1:]


def step(training):
    training.forward_backward(DATA, "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()


def folders(tmp_path, training):
    return {each.name for each in (tmp_path / training.model_id / "sampler_weights").iterdir()}


def test_adapters_of_sampling_sessions_are_unloaded_and_loaded_again(running, training, swarm):
    samplers, expected = [], []
    for _ in range(3):
        step(training)
        samplers.append(training.save_weights_and_get_sampling_client().result())
        expected.append(sampled(samplers[-1]))
        assert sum(name.startswith("tinker ") for name in swarm.model.adapters) == 1
    assert expected[0] != expected[1]
    assert [sampled(each) for each in samplers] == expected
    assert sum(name.startswith("tinker ") for name in swarm.model.adapters) == 1


def test_unnamed_and_expired_weights_are_deleted(running, service, training, tmp_path):
    unnamed = training.save_weights_and_get_sampling_client().result()
    named = training.save_weights_for_sampler("kept").result().path
    expiring = training.save_weights_for_sampler("expiring", ttl_seconds=3600).result().path
    kept, gone = (service.create_sampling_client(model_path=path).result() for path in (named, expiring))
    expected = sampled(kept)
    assert sampled(unnamed) == sampled(gone) == expected
    assert len(folders(tmp_path, training)) == 3
    store = running.tinker._store
    running.call(running.tinker.clean())
    assert len(folders(tmp_path, training)) == 3
    store.change(CheckpointRecord, {"used_s": time.time() - 2.1 * 3600}, run=training.model_id)
    store.change(CheckpointRecord, {"expires_s": time.time() - 1}, name="expiring")
    running.call(running.tinker.clean())
    assert folders(tmp_path, training) == {"kept"}
    assert sampled(kept) == expected
    for each in (unnamed, gone):
        with pytest.raises(tinker.NotFoundError):
            sampled(each)


def test_a_client_without_signs_of_life_is_forgotten_and_its_named_checkpoints_stay(
    running, service, training, tmp_path, swarm
):
    step(training)
    sampler = training.save_weights_and_get_sampling_client().result()
    path = training.save_state("kept").result().path
    session = service.holder.get_session_id()
    running.tinker._store.change(SessionRecord, {"seen_s": time.time() - 25 * 3600}, id=session)
    running.call(running.tinker.clean())
    assert training.model_id not in swarm.model.adapters
    assert folders(tmp_path, training) == set()
    with pytest.raises(tinker.NotFoundError):
        sampled(sampler)
    with pytest.raises(tinker.APIStatusError, match="weights/kept"):
        training.forward(DATA, "cross_entropy").result()
    reply = httpx.post(
        f"{running.url}/api/v1/session_heartbeat", json={"session_id": session}, headers={"X-API-Key": KEY}
    )
    assert reply.status_code == 410  # whereupon the SDK ends its signs of life
    with running.client() as another:
        again = another.create_training_client_from_state_with_optimizer(path).result()
        again.optim_step(ADAM).result()


def test_what_a_client_cancels_lets_go_of_its_session(service, running):
    sampler = service.create_sampling_client(base_model=NAME).result()
    long = types.SamplingParams(max_tokens=60, temperature=1, stop=[])
    future = sampler.sample(PROMPT, 4, long)
    while not any(each.record.kind == "asample" for each in list(running.tinker._promises._by_id.values())):
        time.sleep(0.01)
    future.future().cancel()
    deadline_s = time.monotonic() + 30
    promise = next(iter(p for p in running.tinker._promises._by_id.values() if p.record.kind == "asample"))
    while not promise.task.done():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert sampled(sampler)
