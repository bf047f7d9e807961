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
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.remote.local import LocalBlocks, parse_local_blocks
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
SLOW = ("gemma3_text", "llama", "gpt2", "mixtral")
TOLERANCES = {"LoRA gradients": 3e-5}  # as in test_families.py


@pytest.mark.parametrize("family", ["bloom", *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)])
def test_blocks_here_and_there_give_the_numbers_of_the_plain_model(family, tmp_path):
    figures = parity(family, tmp_path, cut=REST, local_blocks=LOCAL, local_quantization="none")
    assert figures.pop("tokens") == 1, "greedy generation gives the same tokens"
    assert {name: error for name, error in figures.items() if not error <= TOLERANCES.get(name, 1e-5)} == {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small GPT-2 with dropout in its blocks, and a server of all of it: two would draw from one generator here."""
    dropout = {"resid_pdrop": 0.2, "attn_pdrop": 0.2}
    folder = save_model(tmp_path_factory.mktemp("models") / "gpt2", "gpt2", **dropout)
    with in_process_swarm(folder, "0:6", quantization="int8"):
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
        output.loss.backward()
        gradients = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
        return {"logits": output.logits.detach(), **gradients}


@pytest.mark.parametrize(("tuned", "rows"), [(lora, ROWS), (lora, 1), (deep_prompts, ROWS), (ia3, 1)])
def test_int8_blocks_with_dropout_give_the_numbers_of_a_server_to_the_last_bit(folder, tuned, rows):
    there, here = step(folder, tuned, rows=rows), step(folder, tuned, rows=rows, local_blocks=LOCAL)
    assert here.keys() == there.keys()
    for name, value in there.items():
        if rows < ROWS and name != "logits":  # summed over micro-batches in another order
            assert relative_error(here[name], value) <= 1e-5, name
        else:
            assert torch.equal(here[name], value), name


def test_local_blocks_leave_the_client_s_own_draws_as_they_are(folder):
    torch.manual_seed(4)
    expected = torch.rand(4)
    torch.manual_seed(4)
    LocalBlocks(Checkpoint(str(folder)), [BlockSpan(0, 1)], quantization="int8", dtype=torch.float32)
    assert torch.equal(torch.rand(4), expected), "loaded"

    with remote(AutoDistributedModelForCausalLM, folder, local_blocks=["0:2"]) as model:
        torch.manual_seed(3)
        torch.randint(2**62, ())  # the seed of a call
        expected = torch.rand(4)
        torch.manual_seed(3)
        hidden = torch.ones(1, LENGTH, 32)
        model.train()
        assert not torch.equal(model.remote_blocks[:2](hidden), model.remote_blocks[:2](hidden)), "there is dropout"
        torch.manual_seed(3)
        model.remote_blocks[:2](hidden)
        assert torch.equal(torch.rand(4), expected)


def test_nothing_of_local_blocks_is_sent(folder, requests):
    step(folder, lora, rows=ROWS, local_blocks=["0:2", "5:6"])
    assert {request.span for request in requests if isinstance(request, Forward)} == {BlockSpan(2, 5)}
    uploads = [request for request in requests if isinstance(request, PutAdapter)]
    assert {part.block for upload in uploads for part in upload.parts} == {2, 3, 4}
    with remote(AutoDistributedModelForCausalLM, folder, local_blocks=["0:2", "5:6"]) as model, torch.no_grad():
        model.remote_blocks.backbone.micro_batch_rows = ROWS
        embedded = model.get_input_embeddings()(IDS) + model.transformer.wpe.weight[:LENGTH]
        model(input_ids=IDS)
    sent = [request for request in requests if isinstance(request, Forward)][-1]
    assert relative_error(sent.hidden, embedded) > 0.1, "not what every server with the embeddings can look up"


def test_servers_of_the_other_blocks_are_enough_and_needed(folder, monkeypatch):
    with in_process_swarm(folder, "1:3", "4:5"):
        with remote(AutoDistributedModelForCausalLM, folder, local_blocks=LOCAL) as model:
            assert [str(hop.span) for hop in model.remote_blocks.route()] == ["1:3", "4:5"]
            assert "blocks 0:1, here; 1:3, on servers; 3:4, here; 4:5, on servers; 5:6, here" in repr(
                model.remote_blocks
            )
        monkeypatch.setattr(joining, "JOIN_S", 0.2)
        with raises(UncoveredBlocks, missing=(BlockSpan(3, 4), BlockSpan(5, 6))):
            AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=[], local_blocks=["0:1"])


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (["0:7"], "0:7"),
        (["0:2", "1:3"], "1:3"),
        (["4:6", "0:2", "0:2"], "0:2"),
        (["0-2"], "0-2"),
        ([744], 744),  # YAML's 12:24
        ("0:2", "0:2"),
        (["0:2", "2:6"], ["0:2", "2:6"]),
    ],
)
def test_spans_that_cannot_work_are_refused_before_anything_starts(folder, given, seen):
    with raises(ConfigError, key="swarm.local_blocks", seen=seen):
        AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=[], local_blocks=given)


def test_spans_are_taken_in_the_order_of_the_blocks():
    assert [str(span) for span in parse_local_blocks(["28:30", "0:1", "1:2"], 30)] == ["0:1", "1:2", "28:30"]
    assert parse_local_blocks([], 30) == ()


def test_an_unknown_quantization_is_refused(folder):
    with raises(ConfigError, key="quantization", seen="int3"):
        AutoDistributedModelForCausalLM.from_pretrained(
            str(folder), initial_peers=[], local_blocks=["0:1"], local_quantization="int3"
        )


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """The same model with infinity in its last block."""
    model = plain_model(folder)
    model.transformer.h[5].mlp.c_proj.weight[0, 0] = torch.inf
    model.save_pretrained(tmp_path / "broken")
    return tmp_path / "broken"


def test_numbers_that_are_not_finite_are_blamed_on_the_local_block(broken):
    options: dict[str, Any] = {"local_blocks": ["5:6"], "local_quantization": "none"}
    with in_process_swarm(broken, "0:5"), remote(AutoDistributedModelForCausalLM, broken, **options) as model:
        for call in (lambda: model(input_ids=IDS), lambda: model.generate(IDS, max_new_tokens=2)):
            with raises(Diverged) as caught:
                call()
            assert "local blocks 5:6" in str(caught.value)
        assert model.remote_blocks.backbone.chain.client.banned() == frozenset()


def test_gradients_that_are_not_finite_are_blamed_on_who_made_them(folder, monkeypatch):
    with remote(AutoDistributedModelForCausalLM, folder, local_blocks=["0:2"]) as model:
        blocks = model.remote_blocks[:2]
        output = blocks(torch.randn(1, LENGTH, 32, requires_grad=True))
        with raises(RequestRefused, reason="gradient not finite"):
            output.backward(torch.full_like(output, torch.nan))
        run = Engine.run

        def overflowing(engine: Engine, *args: Any) -> torch.Tensor:
            output = run(engine, *args)
            output.register_hook(lambda grad: grad * torch.inf)
            return output

        monkeypatch.setattr(Engine, "run", overflowing)
        output = blocks(torch.randn(1, LENGTH, 32, requires_grad=True))
        with raises(Diverged) as caught:
            output.backward(torch.ones_like(output))
        assert "local blocks 0:2" in str(caught.value)


def test_memory_that_is_not_there_is_blamed_on_the_local_blocks(folder, monkeypatch):
    def full(*args: Any) -> torch.Tensor:
        return torch.empty(2**60, dtype=torch.uint8)  # which the allocator itself refuses

    with remote(AutoDistributedModelForCausalLM, folder, local_blocks=["0:2"]) as model:
        monkeypatch.setattr(Engine, "run", full)
        with raises(ConfigError, key="swarm.local_blocks", seen="0:2"):
            model(input_ids=IDS)
