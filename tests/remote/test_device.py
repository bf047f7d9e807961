"""A client whose own part is on a GPU, and servers whose blocks are: both pretended, with a CPU's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.remote.function import RemoteCall
from tests.inprocess import in_process_swarm
from tests.models import VOCABULARY, masks, plain_model, relative_error, save_model
from tests.parity import remote
from tests.pretend_device import GpuEngine, GpuTensor, counted_waits, pretended_gpus, put_on

ROWS, LENGTH = 3, 9
CUT = ("0:2", "2:6")


@pytest.fixture(scope="module", params=["bloom", pytest.param("llama", marks=pytest.mark.slow)])
def folder(request, tmp_path_factory) -> Iterator[Path]:
    made = save_model(tmp_path_factory.mktemp("models") / request.param, request.param)
    with in_process_swarm(made, *CUT, engine_class=GpuEngine.on_two_cards):
        yield made


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = masks(ROWS, LENGTH)["left"]
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def tuned(model: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    ).eval()


def gradients(net: Any, device: str) -> dict[str, torch.Tensor]:
    inputs = {name: tensor.to(device) for name, tensor in batch().items()}
    labels = batch()["input_ids"].masked_fill(batch()["attention_mask"] == 0, -100).to(device)
    net(**inputs, labels=labels, use_cache=False).loss.backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def test_gradients_of_a_client_on_a_gpu_are_on_it_and_those_of_a_cpu(folder):
    expected = gradients(tuned(plain_model(folder)), "cpu")
    with remote(AutoDistributedModelForCausalLM, folder) as model, pretended_gpus():
        found = gradients(put_on(tuned(model)), "cuda")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert isinstance(found[name], GpuTensor)
        assert relative_error(found[name].values, gradient) <= 1e-5, name


def test_a_client_on_a_gpu_generates_the_same_tokens_with_padding_and_beams(folder):
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    plain = plain_model(folder)
    with remote(AutoDistributedModelForCausalLM, folder) as model, pretended_gpus():
        put_on(model)
        inputs = {name: tensor.to("cuda") for name, tensor in batch().items()}
        for beams in (1, 2):
            found = model.generate(**inputs, **options, num_beams=beams)
            assert found.cpu().tolist() == plain.generate(**batch(), **options, num_beams=beams).tolist()


def test_a_client_on_a_gpu_waits_for_it_once_a_direction(folder, monkeypatch):
    found: dict[str, list[str]] = {}
    with remote(AutoDistributedModelForCausalLM, folder) as model, pretended_gpus():
        net = put_on(tuned(model))
        inputs = {name: tensor.to("cuda") for name, tensor in batch().items()}
        loss = net(**inputs, use_cache=False).logits.sum()
        call: Any = RemoteCall._wait_for

        def sent(self: RemoteCall, work: Any) -> Any:  # what servers wait for is not the client's
            with counted_waits():
                return call(self, work)

        monkeypatch.setattr(RemoteCall, "_wait_for", sent)
        with counted_waits() as found["forward"]:
            net(**inputs, use_cache=False)
        with counted_waits() as found["backward"]:
            loss.backward()
    ours = {what: [wait for wait in waits if "/transformers/" not in wait] for what, waits in found.items()}
    # Forward: the mask, the adapter, the hidden states.
    assert {what: len(waits) for what, waits in ours.items()} == {"forward": 3, "backward": 1}, ours
