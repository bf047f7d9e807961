"""Tinker's interface by its real SDK, against plain PEFT."""

import httpx
import peft
import pytest
import tinker
import torch
from tinker import types

from petals_tune.service.tinker.store import Store
from petals_tune.service.users.keys import Keys
from tests.service.tinker.plain import NAME, PlainTrained, lora_config, running_tinker, tiny_model

KEY = "tml-0123456789abcdef"
TEXTS = [[3, 9, 4, 1, 5], [8, 2, 7], [11, 12, 13, 14, 15, 16]]


def datum(text, **inputs):
    targets = text[1:]
    tensors = {"target_tokens": types.TensorData.from_torch(torch.tensor(targets))}
    for name, values in inputs.items():
        tensors[name] = types.TensorData.from_torch(torch.tensor(values, dtype=torch.float32))
    return types.Datum(model_input=types.ModelInput.from_ints(text[:-1]), loss_fn_inputs=tensors)


DATA = [datum(text, weights=[1.0] * (len(text) - 1)) for text in TEXTS]


@pytest.fixture
def model():
    return PlainTrained()


@pytest.fixture
def service(tmp_path, model):
    with running_tinker(tmp_path, model) as url, tinker.ServiceClient(base_url=url, api_key=KEY) as client:
        yield client


class Reference:
    """The same training with stock PEFT and torch, by hand."""

    def __init__(self, rank, seed):
        torch.manual_seed(seed)
        lora = types.LoraConfig(rank=rank)
        self.net = peft.get_peft_model(tiny_model(), lora_config(lora))
        trained = [each for each in self.net.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    def logprobs(self, text):
        logits = self.net(torch.tensor([text[:-1]])).logits[0]
        return logits.log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None]).flatten()

    def step(self, loss):
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


ADAM = types.AdamParams(learning_rate=1e-2, eps=1e-8)


def test_capabilities_name_the_model(service):
    (model,) = service.get_server_capabilities().supported_models
    assert (model.model_name, model.trainable) == (NAME, True)


def test_ten_steps_are_those_of_plain_peft(service):
    training, reference = service.create_lora_training_client(base_model=NAME, rank=4, seed=5).result(), Reference(4, 5)
    for _ in range(10):
        future = training.forward_backward(DATA, "cross_entropy")
        stepped = training.optim_step(ADAM)
        output, metrics = future.result(), stepped.result().metrics
        expected = [reference.logprobs(text) for text in TEXTS]
        for found, each in zip(output.loss_fn_outputs, expected, strict=True):
            torch.testing.assert_close(found["logprobs"].to_torch(), each.detach(), atol=1e-5, rtol=1e-5)
        loss = -sum(each.sum() for each in expected)
        assert output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["grad_norm"] > 0
        reference.step(loss)
    assert loss.item() < 0.7 * -sum(Reference(4, 5).logprobs(text).sum().item() for text in TEXTS)


def test_losses_and_gradient_norms_are_recorded_by_step(service, tmp_path):
    training = service.create_lora_training_client(base_model=NAME, rank=4, seed=5).result()
    losses, norms = [], []
    for _ in range(3):
        outputs = [training.forward_backward(part, "cross_entropy") for part in (DATA[:1], DATA[1:])]
        training.forward(DATA, "cross_entropy").result()  # does not count
        norms.append(training.optim_step(ADAM).result().metrics["grad_norm"])
        losses.append(sum(output.result().metrics["loss:sum"] for output in outputs) / 11)  # 4 + 2 + 5 targets
    store = Store(tmp_path / "service.sqlite")
    curves = store.curves(training.model_id)
    store.close()
    assert curves["loss"] == [(step, pytest.approx(loss)) for step, loss in enumerate(losses, 1)]
    assert curves["grad_norm"] == [(step, pytest.approx(norm)) for step, norm in enumerate(norms, 1)]


def test_a_custom_loss_is_that_of_plain_torch(service):
    training, reference = service.create_lora_training_client(base_model=NAME, rank=4, seed=5).result(), Reference(4, 5)

    def custom(data, logprobs):
        loss = sum((each.exp() * each).sum() for each in logprobs)
        return loss, {"custom:sum": loss.item()}

    training.forward_backward_custom(DATA, custom).result()
    training.optim_step(ADAM).result()
    reference.step(sum((each.exp() * each).sum() for each in map(reference.logprobs, TEXTS)))
    found = training.forward(DATA, "cross_entropy").result().loss_fn_outputs
    for each, text in zip(found, TEXTS, strict=True):
        torch.testing.assert_close(each["logprobs"].to_torch(), reference.logprobs(text).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_policy_losses(service, loss):
    training = service.create_lora_training_client(base_model=NAME, rank=2, seed=1).result()
    data = [datum(text, logprobs=[-2.0] * (len(text) - 1), advantages=[0.5] * (len(text) - 1)) for text in TEXTS]
    output = training.forward_backward(data, loss).result()
    assert training.optim_step(ADAM).result().metrics["grad_norm"] >= 0
    assert len(output.loss_fn_outputs) == len(TEXTS)


def test_unknown_losses_and_inputs_are_errors_with_their_names(service):
    training = service.create_lora_training_client(base_model=NAME, rank=2).result()
    with pytest.raises(Exception, match="stable_reinforce"):
        training.forward_backward(DATA, "stable_reinforce").result()


def test_sampling_from_tuned_weights(service, model):
    training = service.create_lora_training_client(base_model=NAME, rank=4, seed=5).result()
    for _ in range(30):
        training.forward_backward(DATA[2:], "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=3e-2)).result()
    sampler = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=4, temperature=0)
    prompt = types.ModelInput.from_ints(TEXTS[2][:2])
    response = sampler.sample(prompt, num_samples=2, sampling_params=params, include_prompt_logprobs=True).result()
    first, second = response.sequences
    assert list(first.tokens) == list(second.tokens) == TEXTS[2][2:]
    assert first.sequence_id != second.sequence_id
    logits = model.all_logits(TEXTS[2], training.model_id).log_softmax(-1)
    expected = [logits[place, token].item() for place, token in enumerate(TEXTS[2][1:])]
    assert list(first.logprobs) == pytest.approx(expected[1:], abs=1e-5)
    assert response.prompt_logprobs[0] is None
    assert response.prompt_logprobs[1] == pytest.approx(expected[0], abs=1e-5)


def test_a_run_goes_on_from_its_state_behind_a_restart(tmp_path):
    reference = Reference(4, 5)
    with running_tinker(tmp_path, PlainTrained()) as url, tinker.ServiceClient(base_url=url, api_key=KEY) as service:
        training = service.create_lora_training_client(base_model=NAME, rank=4, seed=5).result()
        for _ in range(3):
            training.forward_backward(DATA, "cross_entropy").result()
            training.optim_step(ADAM).result()
            reference.step(-sum(reference.logprobs(text).sum() for text in TEXTS))
        path = training.save_state("middle").result().path
    with running_tinker(tmp_path, PlainTrained()) as url, tinker.ServiceClient(base_url=url, api_key=KEY) as service:
        training = service.create_training_client_from_state_with_optimizer(path).result()
        for _ in range(3):
            training.forward_backward(DATA, "cross_entropy").result()
            training.optim_step(ADAM).result()
            reference.step(-sum(reference.logprobs(text).sum() for text in TEXTS))
        output = training.forward(DATA, "cross_entropy").result()
    for found, text in zip(output.loss_fn_outputs, TEXTS, strict=True):
        torch.testing.assert_close(
            found["logprobs"].to_torch(), reference.logprobs(text).detach(), atol=1e-5, rtol=1e-5
        )


def test_checkpoints_are_listed_downloaded_as_peft_adapters_and_deleted(service, tmp_path, model):
    training = service.create_lora_training_client(base_model=NAME, rank=4, seed=5).result()
    training.forward_backward(DATA, "cross_entropy").result()
    training.optim_step(ADAM).result()
    path = training.save_state("one").result().path
    exported = training.save_weights_external("two").result().path
    rest = service.create_rest_client()
    found = rest.list_checkpoints(training.model_id).result().checkpoints
    assert {each.tinker_path for each in found} == {path, exported}
    assert rest.get_training_run(training.model_id).result().last_checkpoint.tinker_path == path
    assert [run.training_run_id for run in rest.list_training_runs().result().training_runs] == [training.model_id]
    urls = rest.get_external_weights_urls(exported).result().urls
    for name, url in urls.items():
        (tmp_path / "downloaded").mkdir(exist_ok=True)
        (tmp_path / "downloaded" / name).write_bytes(httpx.get(url).raise_for_status().content)
        assert httpx.get(url.replace("by=", "by=0")).status_code == 403
    plain = peft.PeftModel.from_pretrained(tiny_model(), str(tmp_path / "downloaded"))
    with torch.no_grad():
        found = plain(torch.tensor([TEXTS[0]])).logits[0]
    torch.testing.assert_close(found, model.all_logits(TEXTS[0], training.model_id).detach())
    rest.delete_checkpoint_from_tinker_path(exported).result()
    assert [each.tinker_path for each in rest.list_checkpoints(training.model_id).result().checkpoints] == [path]


def test_a_key_sees_its_own_runs(tmp_path):
    keys = Keys(owners={Keys.digest(KEY): "anna", Keys.digest("tml-another-0123456"): "ben"})
    with running_tinker(tmp_path, PlainTrained(), keys=keys) as url:
        with tinker.ServiceClient(base_url=url, api_key=KEY) as service:
            training = service.create_lora_training_client(base_model=NAME, rank=2).result()
            path = training.save_state("mine").result().path
        with tinker.ServiceClient(base_url=url, api_key="tml-another-0123456") as service:
            assert service.create_rest_client().list_training_runs().result().training_runs == []
            with pytest.raises(tinker.NotFoundError):
                service.create_training_client_from_state(path).result()
