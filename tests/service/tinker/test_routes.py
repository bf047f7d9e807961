"""Tinker's interface by its real SDK over a swarm, against stock PEFT over the plain model."""

import httpx
import peft
import pytest
import tinker
import torch
from tinker import types

from petals_tune.errors import ConfigError
from petals_tune.service.tinker.records import RunRecord
from petals_tune.service.tinker.store import Store
from petals_tune.service.users.keys import Keys
from tests.models import plain_model
from tests.raising import raises
from tests.service.tinker.tiny import (
    ADAM,
    DATA,
    KEY,
    NAME,
    TEXTS,
    Reference,
    assert_like,
    datum,
    running_tinker,
    tiny_swarm,
)

ANOTHER_KEY = "tml-another-0123456"


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    with tiny_swarm(tmp_path_factory.mktemp("model") / "llama") as swarm:
        yield swarm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def running(folder, swarm):
    with running_tinker(folder, swarm.model) as running:
        yield running


@pytest.fixture(scope="module")
def service(running):
    with running.client() as client:
        yield client


def trained(service, steps=0, **lora):
    training = service.create_lora_training_client(base_model=NAME, **{"rank": 4, "seed": 5, **lora}).result()
    for _ in range(steps):
        training.forward_backward(DATA, "cross_entropy").result()
        training.optim_step(ADAM).result()
    return training


def test_capabilities_name_the_model(service):
    (model,) = service.get_server_capabilities().supported_models
    assert (model.model_name, model.trainable) == (NAME, True)


def test_ten_steps_are_those_of_plain_peft(service, swarm):
    training, reference = trained(service), Reference(swarm.plain, 4, 5)
    first = reference.loss().item()
    for _ in range(10):
        future = training.forward_backward(DATA, "cross_entropy")
        stepped = training.optim_step(ADAM)
        output, metrics = future.result(), stepped.result().metrics
        assert_like(output, reference.all_logprobs())
        loss = reference.loss()
        loss.backward()
        assert output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(reference.gradient_norm(), rel=1e-5)
        reference.optimizer.step()
        reference.optimizer.zero_grad()
    assert reference.loss().item() < 0.9 * first


def test_losses_and_gradient_norms_are_recorded_by_step(service, folder):
    training = trained(service)
    losses, norms = [], []
    for _ in range(3):
        outputs = [training.forward_backward(part, "cross_entropy") for part in (DATA[:1], DATA[1:])]
        training.forward(DATA, "cross_entropy").result()  # does not count
        norms.append(training.optim_step(ADAM).result().metrics["grad_norm"])
        losses.append(sum(output.result().metrics["loss:sum"] for output in outputs) / 11)  # 4 + 2 + 5 targets
    store = Store(folder / "runs.sqlite")
    curves = store.curves(training.model_id)
    store.close()
    assert curves["loss"] == [(step, pytest.approx(loss)) for step, loss in enumerate(losses, 1)]
    assert curves["grad_norm"] == [(step, pytest.approx(norm)) for step, norm in enumerate(norms, 1)]


def test_a_custom_loss_is_that_of_plain_torch(service, swarm):
    training, reference = trained(service), Reference(swarm.plain, 4, 5)

    def custom(data, logprobs):
        loss = sum((each.exp() * each).sum() for each in logprobs)
        return loss, {"custom:sum": loss.item()}

    training.forward_backward_custom(DATA, custom).result()
    training.optim_step(ADAM).result()
    reference.step(sum((each.exp() * each).sum() for each in reference.all_logprobs()))
    assert_like(training.forward(DATA, "cross_entropy").result(), reference.all_logprobs())


def policy_losses(logprobs, q, advantages):
    """The losses of one text by their formulas, with the thresholds 0.8 and 1.2 and beta 0.05."""
    ratio = (logprobs - q).exp()
    clipped = ratio.clamp(0.8, 1.2)
    whole = (logprobs - q).mean().exp()
    return {
        "importance_sampling": -(ratio * advantages).sum(),
        "ppo": -torch.minimum(ratio * advantages, clipped * advantages).sum(),
        "cispo": -(clipped.detach() * advantages * logprobs).sum(),
        "dro": -(advantages * logprobs - 0.025 * (logprobs - q) ** 2).sum(),
        "gspo": -len(logprobs) * torch.minimum(whole * 0.5, whole.clamp(0.8, 1.2) * 0.5),
    }


def test_policy_losses_and_their_steps_are_those_of_plain_torch(service, swarm):
    training, reference = trained(service), Reference(swarm.plain, 4, 5)
    for loss in ("importance_sampling", "ppo", "cispo", "dro", "gspo"):
        # So that some ratios are clipped and others not.
        offsets = [torch.linspace(-0.4, 0.3, len(text) - 1) for text in TEXTS]
        q = [each.detach() + offset for each, offset in zip(reference.all_logprobs(), offsets, strict=True)]
        data = [
            datum(text, logprobs=each.tolist(), advantages=[0.5] * len(each))
            for text, each in zip(TEXTS, q, strict=True)
        ]
        output, stepped = training.forward_backward(data, loss), training.optim_step(ADAM)
        parts = zip(reference.all_logprobs(), q, strict=True)
        expected = sum(policy_losses(logprobs, each, torch.tensor(0.5))[loss] for logprobs, each in parts)
        assert output.result().metrics["loss:sum"] == pytest.approx(expected.item(), rel=1e-5), loss
        expected.backward()
        assert stepped.result().metrics["grad_norm"] == pytest.approx(reference.gradient_norm(), rel=1e-5), loss
        reference.optimizer.step()
        reference.optimizer.zero_grad()
    assert_like(training.forward(DATA, "cross_entropy").result(), reference.all_logprobs())


def test_a_failed_request_leaves_the_gradients_and_the_turns_of_the_next_ones(service, swarm):
    training, reference = trained(service), Reference(swarm.plain, 4, 5)
    training.forward_backward(DATA, "cross_entropy")
    wrong = [
        (DATA, "stable_reinforce"),
        (DATA, "no_such_loss"),
        (DATA, "ppo"),  # without advantages
        ([datum(TEXTS[0], weights=[float("nan")] * 4)], "cross_entropy"),
        ([datum(TEXTS[0], weights=[3e38] * 4)], "cross_entropy"),  # diverges
        ([datum([3, 9999, 4], weights=[1.0] * 2)], "cross_entropy"),  # no such token
        ([datum([3] * 100, weights=[1.0] * 99)], "cross_entropy"),  # beyond the model's positions
        ([datum(TEXTS[0], weights=[1.0])], "cross_entropy"),
        ([datum([3], weights=[])], "cross_entropy"),
    ]
    failing = [training.forward_backward(data, loss) for data, loss in wrong]
    failing.append(training.optim_step(types.DimuonParams(learning_rate=1e-3)))
    failing.append(training.save_state("../outside"))
    stepped = training.optim_step(ADAM)
    for each in failing:
        with pytest.raises(tinker.RequestFailedError) as error:
            each.result()
        assert error.value.category == types.RequestErrorCategory.User
    with pytest.raises(tinker.RequestFailedError, match="stable_reinforce"):
        failing[0].result()
    loss = reference.loss()
    loss.backward()
    assert stepped.result().metrics["grad_norm"] == pytest.approx(reference.gradient_norm(), rel=1e-5)


def test_sampling_is_from_saved_weights(service, swarm):
    training, reference = trained(service), Reference(swarm.plain, 4, 5, lr=1e-2)
    fast = types.AdamParams(learning_rate=1e-2, eps=1e-8)
    for _ in range(20):
        training.forward_backward(DATA[2:], "cross_entropy")
        training.optim_step(fast).result()
    sampler = training.save_weights_and_get_sampling_client().result()
    for _ in range(5):  # the live weights go on
        training.forward_backward(DATA[:1], "cross_entropy")
        training.optim_step(fast).result()
    params = types.SamplingParams(max_tokens=4, temperature=0)
    prompt = types.ModelInput.from_ints(TEXTS[2][:2])
    response = sampler.sample(prompt, 2, params, include_prompt_logprobs=True, topk_prompt_logprobs=3).result()
    first, second = response.sequences
    assert list(first.tokens) == list(second.tokens) == TEXTS[2][2:]
    assert first.sequence_id != second.sequence_id
    for _ in range(20):
        reference.step(-reference.logprobs(TEXTS[2]).sum())
    expected = reference.logprobs(TEXTS[2]).tolist()
    assert list(first.logprobs) == pytest.approx(expected[1:], abs=1e-3)  # 20 steps at a high rate
    assert response.prompt_logprobs[0] is None
    assert response.prompt_logprobs[1] == pytest.approx(expected[0], abs=1e-3)
    top = reference.net(torch.tensor([TEXTS[2][:2]])).logits[0, 0].log_softmax(-1).topk(3)
    assert [token for token, _ in response.topk_prompt_logprobs[1]] == top.indices.tolist()
    assert sampler.compute_logprobs(types.ModelInput.from_ints(TEXTS[2])).result()[1:] == pytest.approx(
        expected, abs=1e-3
    )


def test_seeds_stops_and_what_is_not_honoured(service):
    sampler = service.create_sampling_client(base_model=NAME).result()
    prompt = types.ModelInput.from_ints([3, 9, 4])

    def sampled(count=1, **params):
        response = sampler.sample(prompt, count, types.SamplingParams(max_tokens=12, **params)).result()
        return [list(each.tokens) for each in response.sequences]

    several = sampled(3, seed=7, stop=[])
    assert several == sampled(3, seed=7, stop=[])
    assert len({tuple(each) for each in several}) > 1
    (tokens,) = sampled(seed=7, stop=[])
    assert len(tokens) == 12
    stop = tokens[3]
    assert sampled(seed=7, stop=[stop])[0] == tokens[: tokens.index(stop) + 1]
    assert sampled(seed=7, stop=[f"w{stop}"])[0] == tokens[: tokens.index(stop) + 1]
    assert sampled(seed=7, stop=[], top_k=1) == sampled(temperature=0, stop=[])
    for options in (
        {"prompt_alt_tokens_k": 2},
        {"target_prompt_logprobs": types.TensorData.from_torch(torch.zeros(2, 1).long())},
    ):
        with pytest.raises(tinker.BadRequestError, match=next(iter(options))):
            sampler.sample(prompt, 1, types.SamplingParams(max_tokens=1), **options).result()
    with pytest.raises(tinker.BadRequestError, match="positions"):
        sampler.sample(prompt, 1, types.SamplingParams(max_tokens=1000)).result()
    with pytest.raises(tinker.BadRequestError, match="no token"):
        sampler.sample(types.ModelInput.from_ints([9999]), 1, types.SamplingParams(max_tokens=1)).result()


def test_checkpoints_are_listed_downloaded_as_peft_adapters_and_deleted(service, running, swarm, tmp_path):
    training = trained(service, 1)
    path = training.save_state("one").result().path
    exported = training.save_weights_external("two").result().path
    rest = tinker.RestClient(base_url=running.url, api_key=KEY)
    found = rest.list_checkpoints(training.model_id).result().checkpoints
    assert {each.tinker_path for each in found} == {path, exported}
    assert rest.get_training_run(training.model_id).result().last_checkpoint.tinker_path == path
    assert training.model_id in [run.training_run_id for run in rest.list_training_runs().result().training_runs]
    with pytest.raises(tinker.RequestFailedError, match="overwrite"):
        training.save_state("one").result()
    assert training.save_state("one", overwrite=True).result().path == path
    urls = rest.get_external_weights_urls(exported).result().urls
    (tmp_path / "downloaded").mkdir()
    for name, url in urls.items():
        (tmp_path / "downloaded" / name).write_bytes(httpx.get(url).raise_for_status().content)
        assert httpx.get(url.replace("by=", "by=0")).status_code == 403
    stock = peft.PeftModel.from_pretrained(plain_model(swarm.plain), str(tmp_path / "downloaded"))
    with torch.no_grad():
        found = stock(torch.tensor([TEXTS[0]])).logits
        expected = swarm.model(torch.tensor([TEXTS[0]]), adapter=training.model_id, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert sum(len(each) for each in urls) < 2**16  # no base model's head
    rest.delete_checkpoint_from_tinker_path(exported).result()
    assert [each.tinker_path for each in rest.list_checkpoints(training.model_id).result().checkpoints] == [path]


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("downloads/a/weights/b/c?until=" + "9" * 5000 + "&by=0", 403),
        ("downloads/a/weights/b/c?until=99999999999&by=%C3%A9", 403),
        ("downloads/a/weights/b/c?until=never", 403),
        ("training_runs?offset=" + "9" * 5000, 400),
        ("training_runs?limit=-1", 400),
        ("training_runs?limit=0", 200),
    ],
)
def test_what_stands_in_a_query_is_no_fault_of_the_service(running, query, status):
    assert httpx.get(f"{running.url}/api/v1/{query}", headers={"X-API-Key": KEY}).status_code == status


def test_a_name_of_a_checkpoint_is_one_folder(service, folder):
    training, before = trained(service), {*folder.rglob("*.safetensors")}
    for name in ("../x", "a/b", ".", "", "x" * 101, "a\0b", "é"):
        with pytest.raises(tinker.RequestFailedError, match="up to 100"):
            training.save_state(name).result()
    assert {*folder.rglob("*.safetensors")} == before


def test_sessions_samplers_and_handles(service, running):
    rest = tinker.RestClient(base_url=running.url, api_key=KEY)
    training = trained(service)
    sampler = training.save_weights_and_get_sampling_client().result()
    session = service.holder.get_session_id()
    assert session in rest.list_sessions().result().sessions
    described = rest.get_session(session).result()
    assert training.model_id in described.training_run_ids
    assert sampler._sampling_session_id in described.sampler_ids
    found = rest.get_sampler(sampler._sampling_session_id).result()
    assert found.base_model == NAME
    assert found.model_path.startswith(f"tinker://{training.model_id}/sampler_weights/")
    info = rest.get_weights_info_by_tinker_path(found.model_path).result()
    assert (info.base_model, info.lora_rank, info.train_mlp) == (NAME, 4, True)
    again = tinker.SamplingClient.from_sampler_handle(sampler.get_sampler_handle(), api_key=KEY)
    prompt, params = types.ModelInput.from_ints([3, 9]), types.SamplingParams(max_tokens=3, temperature=0)
    tokens = [each.sample(prompt, 1, params).result().sequences[0].tokens for each in (sampler, again)]
    assert tokens[0] == tokens[1]


def test_what_is_not_honoured_is_refused_by_name(service, running):
    rest = tinker.RestClient(base_url=running.url, api_key=KEY)
    admin = tinker.AdminClient(base_url=running.url, api_key=KEY)
    training = trained(service)
    path = training.save_state("kept").result().path
    for refused in (
        lambda: rest.copy_weights(path, "project"),
        lambda: rest.assign_session_project(service.holder.get_session_id(), "project"),
        lambda: rest.export_session_trace(service.holder.get_session_id()),
        lambda: rest.search_sessions(types.SessionSearchRequest()),
        lambda: admin.get_audit_log(),
        lambda: admin.get_current_checkpoint_storage_usage(),
        lambda: service.create_lora_training_client(base_model=NAME, optimizer=types.DimuonOptimizerConfig()),
        lambda: service.create_lora_training_client(base_model=NAME, rank=0),
        lambda: rest.set_checkpoint_ttl_from_tinker_path(path, 5),
    ):
        with pytest.raises(tinker.BadRequestError):
            refused().result()
    for another in (
        lambda: service.create_lora_training_client(base_model="another/model"),
        lambda: service.create_sampling_client(base_model="another/model"),
        lambda: service.create_sampling_client(model_path="tinker://no/weights/one"),
    ):
        with pytest.raises(tinker.NotFoundError):
            another().result()
    for inflight in (
        training.save_weights_and_get_sampling_client(kind="inflight"),
        training.forward_backward([images()], "cross_entropy"),
    ):
        with pytest.raises(tinker.RequestFailedError):
            inflight.result()


def test_a_run_is_begun_once(service, running):
    training = trained(service, 1)
    record = running.tinker._store.one(RunRecord, id=training.model_id)
    with raises(ConfigError, key="model_seq_id"):
        running.call(running.tinker._live.begin(record))


def images():
    image = types.ImageChunk(data=b"0", format="png", expected_tokens=1)
    tensors = {"target_tokens": types.TensorData.from_torch(torch.tensor([1]))}
    return types.Datum(model_input=types.ModelInput(chunks=[image]), loss_fn_inputs=tensors)


def test_a_key_sees_its_own_runs(tmp_path, swarm):
    keys = Keys(owners={Keys.digest(KEY): "anna", Keys.digest(ANOTHER_KEY): "ben"})
    with running_tinker(tmp_path, swarm.model, keys=keys) as running, running.client() as anna:
        training = trained(anna)
        path = training.save_state("mine").result().path
        sampler = training.save_weights_and_get_sampling_client().result()
        session = anna.holder.get_session_id()
        pending = training.forward(DATA, "cross_entropy")
        pending.result()
        with running.client(ANOTHER_KEY) as ben:
            rest = tinker.RestClient(base_url=running.url, api_key=ANOTHER_KEY)
            assert rest.list_training_runs().result().training_runs == []
            assert rest.list_user_checkpoints().result().checkpoints == []
            assert session not in rest.list_sessions().result().sessions
            sampler_id = sampler._sampling_session_id
            for refused in (
                lambda: ben.create_training_client_from_state(path),
                lambda: ben.create_sampling_client(model_path=path),
                lambda: rest.get_training_run(training.model_id),
                lambda: rest.list_checkpoints(training.model_id),
                lambda: rest.delete_checkpoint_from_tinker_path(path),
                lambda: rest.publish_checkpoint_from_tinker_path(path),
                lambda: rest.set_checkpoint_ttl_from_tinker_path(path, 3600),
                lambda: rest.get_weights_info_by_tinker_path(path),
                lambda: rest.get_session(session),
                lambda: rest.get_sampler(sampler_id),
            ):
                with pytest.raises(tinker.NotFoundError):
                    refused().result()
        posts = {
            "get_info": {"model_id": training.model_id},
            "optim_step": {"model_id": training.model_id, "seq_id": 9, "adam_params": {}},
            "save_weights": {"model_id": training.model_id, "seq_id": 9, "path": "x"},
            "load_weights": {"model_id": training.model_id, "seq_id": 9, "path": path, "optimizer": False},
            "asample": {
                "sampling_session_id": sampler_id,
                "seq_id": 1,
                "prompt": {"chunks": [{"type": "encoded_text", "tokens": [3]}]},
            },
            "join_sampling_session": {"sampling_session_id": sampler_id},
        }
        for name, body in posts.items():
            reply = httpx.post(f"{running.url}/api/v1/{name}", json=body, headers={"X-API-Key": ANOTHER_KEY})
            assert reply.status_code == 404, name
        httpx.post(f"{running.url}/api/v1/sessions/{session}/finish", json={}, headers={"X-API-Key": ANOTHER_KEY})
        assert tinker.RestClient(base_url=running.url, api_key=KEY).get_session(session).result().sampler_ids == [
            sampler_id
        ]
