"""A job of the real recipe, over real servers: the way of a request from the upload to the model that it makes."""

from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from petals_tune.config import composed
from petals_tune.remote.auto import AutoDistributedModelForCausalLM
from petals_tune.service.adapter_folder import AdapterFolder
from petals_tune.service.tuning.opened import opened_tuning
from petals_tune.service.users.keys import Keys
from petals_tune.service.web.app import application
from petals_tune.swarm.local import local_swarm
from petals_tune.train.options import LocalSwarm
from tests.processes import wait_until
from tests.service.port import served
from tests.service.tuning.small import chat, jsonl, upload
from tests.train.tiny import BLOCKS, save_tiny

IDS = torch.tensor([[40, 41, 42, 43, 44]])
CHATS = jsonl([chat(f"{number}?", f"{number + 1}!") for number in range(12)])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def swarm():
    return LocalSwarm(servers=1, quantization="none", wire_format="float32", grad_format="float32")


@pytest.fixture(scope="module")
def peers(tiny, swarm):
    with local_swarm(str(tiny), spans=[f"0:{BLOCKS}"], quantization="none") as peers:
        yield peers


@pytest.fixture
def model(tiny, swarm, peers):
    model = AutoDistributedModelForCausalLM.from_pretrained(tiny, initial_peers=peers, **swarm.client_options())
    yield model
    model.remote_blocks.close()


@contextmanager
def service(cfg, swarm, peers, model):
    """The routes of tuning on a free port: (a client, the offers)."""
    offers = AdapterFolder(["tiny"], None, load=model.adapters.load, remove=model.adapters.remove)

    @asynccontextmanager
    async def opened():
        async with opened_tuning(cfg, swarm, peers, offers, model.adapters, {"tiny": 64}) as routes:
            yield application(routes, Keys(owners=None))

    with served(opened) as running:
        yield openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0), offers


@pytest.mark.slow
@pytest.mark.swarm
def test_the_recipe_makes_a_model_of_the_service_also_when_it_is_started_again_in_the_middle(
    tmp_path, tiny, swarm, peers, model
):
    cfg = composed(
        [f"model.source='{tiny}'", f"folder='{tmp_path}'", "outputs=null", "tuning.jobs_a_key=2"], config_name="service"
    )
    method = {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": 12, "batch_size": 4, "learning_rate_multiplier": 10}},
    }
    with service(cfg, swarm, peers, model) as (client, _):
        file = upload(client, CHATS)
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file, seed=1, suffix="count", method=method)
        bad = client.fine_tuning.jobs.create(
            model="tiny",
            training_file=upload(client, jsonl([chat("a?", "b" * 80), chat("c?", "d" * 80)])),
            validation_file=file,
        )
        waited(lambda: any("Step 3" in each.message for each in events(client, job)), "three steps")
    checkpoint = Path(tmp_path, "tuning", "jobs", job.id, "run", "checkpoint.ckpt")
    assert checkpoint.exists()
    with service(cfg, swarm, peers, model) as (client, offers):
        waited(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded", "the end of the job")
        job = client.fine_tuning.jobs.retrieve(job.id)
        metrics = [each.data for each in events(client, job) if each.type == "metrics"][::-1]
        losses = {each["step"]: each["train_loss"] for each in metrics if "train_loss" in each}
        steps = [each["step"] for each in metrics if "train_loss" in each]
        assert steps == sorted(set(steps)), "a step is reported twice"
        # 11 or 12 chats, some of them held out, in batches of 4; the step in which the stop came may have no row.
        assert len(set(range(1, 37)) - set(steps)) <= 1
        assert steps[-1] == 36
        assert losses[36] < losses[1] / 2
        assert [offer.name for offer in offers.of("everybody")] == ["tiny", job.fine_tuned_model]
        waited(lambda: client.fine_tuning.jobs.retrieve(bad.id).status == "failed", "the end of a bad job")
        assert "data.max_tokens=64" in client.fine_tuning.jobs.retrieve(bad.id).error.message
        adapter = checkpoint.parent / "adapter"
        plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        with torch.inference_mode():
            base, tuned = (model(input_ids=IDS, adapter=name).logits for name in (None, job.fine_tuned_model))
            torch.testing.assert_close(base, plain(IDS).logits, atol=1e-5, rtol=1e-5)
            expected = PeftModel.from_pretrained(plain, str(adapter)).eval()(IDS).logits
        torch.testing.assert_close(tuned, expected, atol=1e-5, rtol=1e-5)
        assert (tuned - base).abs().max() > 0.1
        assert client.fine_tuning.jobs.retrieve(job.id).trained_tokens > 12 * 8 * 5
        further = client.fine_tuning.jobs.create(
            model=job.fine_tuned_model, training_file=file, hyperparameters={"n_epochs": 1}
        )
        waited(lambda: client.fine_tuning.jobs.retrieve(further.id).status == "succeeded", "the end of another job")
        (first,) = (each.data["valid_loss"] for each in events(client, further) if each.data.get("step") == 0)
        last = [each["valid_loss"] for each in metrics if "valid_loss" in each][-1]
        assert first == pytest.approx(last, rel=1e-4)  # it goes on from what the first one learned
        client.models.delete(job.fine_tuned_model)
        assert list(model.adapters) == [client.fine_tuning.jobs.retrieve(further.id).fine_tuned_model]


def waited(holds, what):
    """Wait for a process that imports all of a training, on a machine that is busy."""
    wait_until(holds, what, long_s=300)


def events(client, job):
    return client.fine_tuning.jobs.list_events(job.id, limit=1000).data
