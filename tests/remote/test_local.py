"""Local blocks: the numbers of servers and of the plain model, in one graph, and nothing of them on the wire."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.blocks.engine import Engine
from petals_tune.errors import ConfigError, Diverged, RequestRefused, UncoveredBlocks
from petals_tune.remote.local import parse_local_blocks
from petals_tune.swarm import joining
from petals_tune.tuning.deep_prompt import DeepPromptConfig, with_deep_prompts
from petals_tune.wire.messages import Forward, Message, PutAdapter
from petals_tune.wire.span import BlockSpan
from servers.requests.handler import Handler
from tests.inprocess import in_process_swarm
from tests.models import VOCABULARY, plain_model, relative_error, save_model
from tests.parity import parity, remote
from tests.raising import raises

LOCAL, REST = ("0:1", "3:4", "5:6"), ("1:3", "4:5")  # first, last, and one in the middle
ROWS, LENGTH = 4, 8
IDS = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
TOLERANCES = {"LoRA gradients": 3e-5}  # as in test_families.py


@pytest.mark.parametrize("family", ["bloom", "llama", "gpt2", "gemma3_text", "mixtral"])
def test_blocks_here_and_there_give_the_numbers_of_the_plain_model(family, tmp_path):
    figures = parity(family, tmp_path, cut=REST, local_blocks=LOCAL, local_quantization="none")
    assert figures.pop("tokens") == 1, "greedy generation gives the same tokens"
    assert {name: error for name, error in figures.items() if not error <= TOLERANCES.get(name, 1e-5)} == {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small GPT-2 with dropout in its blocks; servers hold all of it."""
    dropout = {"resid_pdrop": 0.2, "attn_pdrop": 0.2}
    folder = save_model(tmp_path_factory.mktemp("models") / "gpt2", "gpt2", **dropout)
    with in_process_swarm(folder, "0:3", "3:6", quantization="int8"):
        yield folder


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """What servers in this process were asked."""
    seen: list[Message] = []
    reply = Handler._reply

    async def recorded(self: Handler, client: str, request: Message) -> Message:
        seen.append(request)
        return await reply(self, client, request)

    monkeypatch.setattr(Handler, "_reply", recorded)
    return seen


def lora(model: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["c_attn", "c_fc"], lora_dropout=0.3, init_lora_weights=False
    )
    return peft.get_peft_model(model, config)


def deep_prompts(model: Any) -> Any:
    torch.manual_seed(1)
    net = with_deep_prompts(model, DeepPromptConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for name, parameter in net.named_parameters():
        if "deep_prompt" in name:
            parameter.data.normal_()
    return net


def ia3(model: Any) -> Any:
    torch.manual_seed(1)
    config = peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]
    )
    return peft.get_peft_model(model, config)


def step(folder: Path, tuned: Any, *, rows: int, **options: Any) -> dict[str, torch.Tensor]:
    """Logits and gradients of one training step with dropout, in micro-batches of `rows`."""
    with remote(AutoDistributedModelForCausalLM, folder, **options) as model:
        model.remote_blocks.backbone.micro_batch_rows = rows
        net = tuned(model).train()
        torch.manual_seed(2)
        output = net(input_ids=IDS, labels=IDS)
        drawn = torch.rand(1)
        output.loss.backward()
        gradients = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
        return {"logits": output.logits.detach(), "drawn afterwards": drawn, **gradients}


@pytest.mark.parametrize("tuned", [lora, deep_prompts, ia3])
@pytest.mark.parametrize("rows", [ROWS, 1])
def test_int8_blocks_with_dropout_give_the_numbers_of_a_server_to_the_last_bit(folder, tuned, rows):
    there, here = step(folder, tuned, rows=rows), step(folder, tuned, rows=rows, local_blocks=LOCAL)
    assert here.keys() == there.keys()
    for name, value in there.items():
        if rows < ROWS and name not in ("logits", "drawn afterwards"):  # summed over micro-batches in another order
            assert relative_error(here[name], value) <= 1e-5, name
        else:
            assert torch.equal(here[name], value), name
