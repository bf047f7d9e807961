"""Texts and whole prompts of a model with remote blocks, against the same model in this process."""

import threading
from concurrent.futures import CancelledError

import pytest
import torch

from petals_tune.errors import ConfigError
from petals_tune.remote.auto import AutoDistributedModelForCausalLM
from petals_tune.service.remote import RemoteModel
from tests.inprocess import in_process_swarm
from tests.raising import raises
from tests.service.swarm import save_adapter

IDS = [5, 9, 33, 7, 120]
MORE = [8, 41, 3]


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    return {
        None: None,
        "lora": save_adapter(place / "lora", folder, seed=1),
        "soft": save_adapter(place / "soft", folder, seed=2, kind="prompt"),
    }


@pytest.fixture(scope="module")
def swarm(folder):
    with in_process_swarm(folder, "0:1", "1:2") as swarm:
        yield swarm


@pytest.fixture(scope="module")
def model(swarm, folder, adapters):
    model = AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=["in this process"])
    for name in ("lora", "soft"):
        model.adapters.load(name, adapters[name])
    yield model
    model.remote_blocks.close()


@pytest.fixture
def remote(model):
    with torch.inference_mode():
        yield RemoteModel(model)


def logits_of(plain, adapter, ids):
    """(S, V), of the text alone where a soft prompt stands in front of it."""
    with torch.inference_mode():
        return plain.model(adapter)(input_ids=torch.tensor([ids])).logits[0, -len(ids) :]


@pytest.mark.parametrize("name", [None, "lora", "soft"])
def test_a_text_goes_on_and_forks_with_the_models_own_logits(remote, swarm, plain, adapters, name):
    expected = logits_of(plain, adapters[name], IDS + MORE)
    text = remote.open(name, len(IDS) + len(MORE), threading.Event())
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(text.logits(IDS), expected[len(IDS) - 1], **close)
    fork = text.fork()
    for each in (fork, text):
        for number, token in enumerate(MORE):
            torch.testing.assert_close(each.logits([token]), expected[len(IDS) + number], **close)
    assert swarm.sessions(1) == 2
    for each in (fork, text):
        each.close()
    assert not swarm.sessions(1)


def test_a_text_keeps_the_adapter_that_its_name_had(remote, model, plain, adapters, folder, tmp_path):
    model.adapters.load("mine", adapters["lora"])
    text = remote.open("mine", 8, threading.Event())
    text.logits(IDS)
    model.adapters.load("mine", save_adapter(tmp_path / "other", folder, seed=9))
    model.adapters.remove("mine")
    expected = logits_of(plain, adapters["lora"], [*IDS, 8])[-1]
    torch.testing.assert_close(text.logits([8]), expected, atol=1e-4, rtol=1e-4)
    text.close()
    with raises(ConfigError, key="adapter"):
        remote.open("mine", 8, threading.Event())


def test_a_step_that_nobody_wants_is_given_up(folder):
    """Where nobody holds the blocks any more, a step looks for others for minutes."""
    cancelled, failed = threading.Event(), threading.Event()
    with in_process_swarm(folder, "0:2") as swarm, torch.inference_mode():
        model = AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=["in this process"])
        text = RemoteModel(model).open(None, 8, cancelled)
        text.logits(IDS)
        swarm.kill(1)

        def step() -> None:
            with pytest.raises(CancelledError), torch.inference_mode():
                text.logits([8])
            failed.set()

        stepping = threading.Thread(target=step)
        stepping.start()
        assert not failed.wait(0.5), "it looks for another server"
        cancelled.set()
        assert failed.wait(30)
        stepping.join()
        text.close()
        model.remote_blocks.close()


@pytest.mark.parametrize("name", [None, "lora", "soft"])
def test_whole_texts_have_the_models_own_numbers(remote, plain, adapters, name):
    torch.testing.assert_close(
        remote.all_logits(IDS, name), logits_of(plain, adapters[name], IDS), atol=1e-4, rtol=1e-4
    )
    with torch.inference_mode():
        hidden = plain.model(adapters[name])(input_ids=torch.tensor([IDS]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(remote.hidden(IDS, name), hidden[-1][0, -len(IDS) :], atol=1e-4, rtol=1e-4)
