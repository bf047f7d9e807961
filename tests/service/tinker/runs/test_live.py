"""Runs that are written out and loaded again: for want of room, and when the service stops and begins again."""

import threading
import time

import pytest
import tinker
from tinker import types

from petals_tune.service.tinker.routes import Limits
from tests.service.tinker.tiny import ADAM, DATA, NAME, TEXTS, Reference, assert_like, running_tinker, tiny_swarm


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    with tiny_swarm(tmp_path_factory.mktemp("model") / "llama") as swarm:
        yield swarm


def created(service, seed):
    return service.create_lora_training_client(base_model=NAME, rank=4, seed=seed).result()


def step(training):
    training.forward_backward(DATA, "cross_entropy").result()
    training.optim_step(ADAM).result()


def half_step(training):
    """Gradients of a part of the data, so that they are what is lost if anything is."""
    training.forward_backward(DATA[:1], "cross_entropy").result()


def half_step_by_hand(reference):
    (-reference.logprobs(TEXTS[0]).sum()).backward()


def free_port(url):
    return int(url.rpartition(":")[2])


def test_several_clients_at_once_are_each_as_if_alone(swarm, tmp_path):
    """More runs than fit into memory, so that they come and go."""
    seeds = (1, 2)
    with running_tinker(tmp_path, swarm.model, limits=Limits(runs_in_memory=1)) as running, running.client() as service:
        clients = {seed: created(service, seed) for seed in seeds}
        failures = []

        def train(seed):
            try:
                step(clients[seed])
                half_step(clients[seed])
            except BaseException as error:
                failures.append(error)
                raise

        threads = [threading.Thread(target=train, args=(seed,)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        created(service, 3)
        assert len(running.tinker._live._live) == 1
        for seed in seeds:
            reference = Reference(swarm.plain, 4, seed)
            reference.step()
            half_step_by_hand(reference)
            assert_like(clients[seed].forward(DATA, "cross_entropy").result(), reference.all_logprobs())
            metrics = clients[seed].optim_step(ADAM).result().metrics
            assert metrics["grad_norm"] == pytest.approx(reference.gradient_norm(), rel=1e-4)


def test_a_client_that_lives_on_goes_on_behind_a_restart(swarm, tmp_path):
    """Its run, its gradients, requests that wait, and its sampling client."""
    reference = Reference(swarm.plain, 4, 5)
    for _ in range(2):
        reference.step()
    half_step_by_hand(reference)
    with running_tinker(tmp_path, swarm.model) as running:
        url, service = running.url, running.client()
        training = created(service, 5)
        sampler = training.save_weights_and_get_sampling_client().result()
        prompt, params = types.ModelInput.from_ints(TEXTS[0][:2]), types.SamplingParams(max_tokens=3, temperature=0)
        first = sampler.sample(prompt, 1, params).result().sequences[0].tokens
        for _ in range(2):
            step(training)
        half_step(training)
        training._request_id_counter += 1  # a request that has not come yet, for which the next ones wait
        training._turn_counter += 1
        number = training._request_id_counter
        waiting = training.optim_step(ADAM)
        _wait_until(lambda: training.model_id in running.tinker._live._live and _waits(running, training))
    with running_tinker(tmp_path, swarm.model, port=free_port(url)) as running:
        missing = types.ForwardBackwardRequest(
            forward_backward_input=types.ForwardBackwardInput(data=DATA[1:], loss_fn="cross_entropy"),
            model_id=training.model_id,
            seq_id=number,
        )
        _send(training, missing)
        (-(reference.logprobs(TEXTS[1]).sum() + reference.logprobs(TEXTS[2]).sum())).backward()
        assert waiting.result(60).metrics["grad_norm"] == pytest.approx(reference.gradient_norm(), rel=1e-4)
        reference.optimizer.step()
        reference.optimizer.zero_grad()
        assert_like(training.forward(DATA, "cross_entropy").result(60), reference.all_logprobs())
        step(training)
        reference.step()
        assert_like(training.forward(DATA, "cross_entropy").result(), reference.all_logprobs())
        assert sampler.sample(prompt, 1, params).result(60).sequences[0].tokens == first
        curves = running.tinker._store.curves(training.model_id)
        assert [number for number, _ in curves["loss"]] == [1, 2, 3, 4]
        service.close("success").result()


def _waits(running, training):
    return bool(running.tinker._live._live[training.model_id].turns._waiting)


def _wait_until(condition):
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def _send(training, request):
    from tinker.lib.client_connection_pool_type import ClientConnectionPoolType

    async def send():
        with training.holder.aclient(ClientConnectionPoolType.TRAIN) as client:
            return await client.training.forward_backward(request=request, forward_only=False)

    training.holder.run_coroutine_threadsafe(send()).result()


def test_a_run_that_a_kill_took_names_its_last_checkpoint(swarm, tmp_path):
    reference = Reference(swarm.plain, 4, 5)
    with running_tinker(tmp_path, swarm.model, limits=Limits(autosave_minutes=1e-9)) as running:
        url, service = running.url, running.client()
        training = created(service, 5)
        for _ in range(2):
            step(training)
            reference.step()
        # A kill: nothing is written out, and a checkpoint is half written.
        (tmp_path / training.model_id / "weights" / ".partial-half").mkdir()
        (tmp_path / training.model_id / "weights" / "half").mkdir()
        running.tinker._live._live.clear()
        running.tinker._promises._by_id.clear()
    with running_tinker(tmp_path, swarm.model, port=free_port(url)) as running:
        assert not (tmp_path / training.model_id / "weights" / "half").exists()
        path = f"tinker://{training.model_id}/weights/autosave"
        call = f"create_training_client_from_state_with_optimizer\\('{path}'\\)"
        with pytest.raises(tinker.APIStatusError, match=call):
            training.forward(DATA, "cross_entropy").result(60)
        again = service.create_training_client_from_state_with_optimizer(path).result()
        assert_like(again.forward(DATA, "cross_entropy").result(), reference.all_logprobs())
        step(again)
        reference.step()
        assert_like(again.forward(DATA, "cross_entropy").result(), reference.all_logprobs())
        service.close("success").result()
