"""Cutting a batch into micro-batches: what servers take in one message, and what the numbers are then."""

import asyncio
import time
from pathlib import Path

import peft
import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.footprint import Pass
from petals_tune.errors import RequestRefused, RequestTooLarge
from petals_tune.net.stream import OVERHEAD_BYTES
from petals_tune.wire.messages import Backward, Chained, Forward, Message, Step
from petals_tune.wire.span import BlockSpan
from servers.requests.handler import Handler
from servers.stores.leases import LeaseStore
from tests.inprocess import in_process_swarm
from tests.models import VOCABULARY, plain_model, relative_error, save_model
from tests.raising import raises
from tests.servers.parts import load

ROWS, LENGTH, HIDDEN = 6, 16, 32
ROW_BYTES = 4 * LENGTH * HIDDEN  # float32
IDS = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """What servers in this process were asked."""
    seen: list[Message] = []
    reply = Handler._reply

    async def recorded(self: Handler, client: str, request: Message) -> Message:
        if not isinstance(request, Chained):
            seen.append(request)
        return await reply(self, client, request)

    monkeypatch.setattr(Handler, "_reply", recorded)
    return seen


def remote(folder: Path):
    return AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=["in", "process"])


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    """Of LoRA on all linears of the attention, with the same start everywhere."""
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, config)
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    return [parameter.grad for parameter in tuned.parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("rows_that_fit", "limits"),
    [
        # A forward that will have a backward counts twice: its input and a gradient may have to travel together.
        *((rows, {"max_message_bytes": 2 * rows * ROW_BYTES + OVERHEAD_BYTES}) for rows in (1, 2, 4)),
        (2, {"max_tokens": 2 * LENGTH + 1}),
    ],
)
def test_a_batch_is_cut_into_what_a_server_takes_at_once(folder, requests, rows_that_fit, limits):
    with in_process_swarm(folder, "0:2", "2:6", **limits):
        model = remote(folder)
        found, expected = gradients(model), gradients(plain_model(folder))
        model.remote_blocks.close()
    assert max(relative_error(*pair) for pair in zip(found, expected, strict=True)) <= 1e-5
    sizes = [len(request.hidden) for request in requests if isinstance(request, Forward)]
    assert max(sizes) <= rows_that_fit
    assert sum(sizes) == 2 * ROWS, "each row once at each of two servers"
    assert sum(len(request.grad) for request in requests if isinstance(request, Backward)) == 2 * ROWS


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_graphs_are_kept_for_a_backward_alone(folder, requests, without):
    """Not in an evaluation, whose LoRA is a trained one all the same."""
    with in_process_swarm(folder, "0:2", "2:6"):
        model = remote(folder)
        tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
        with without():
            tuned(input_ids=IDS)
        model.remote_blocks.close()
    kept = {request.keep for request in requests if isinstance(request, Forward)}
    assert kept == {without is torch.enable_grad}


def test_a_row_that_is_too_large_alone_is_refused_with_what_would_fit(folder, requests):
    limit = ROW_BYTES + OVERHEAD_BYTES - 1
    with in_process_swarm(folder, "0:6", max_message_bytes=limit):
        model = remote(folder)
        with torch.no_grad(), raises(RequestTooLarge, limit="max_message_mb", size=LENGTH, fits=LENGTH - 1):
            model(input_ids=IDS)
        model.remote_blocks.close()
    assert not requests, "nothing was sent"


@pytest.mark.parametrize(
    "limits",
    [
        {"max_message_bytes": ROW_BYTES // 4 + 100 + OVERHEAD_BYTES},  # two positions, and their ids
        {"max_tokens": 5},
        {"max_positions": 2},
    ],
    ids=lambda limits: next(iter(limits)),
)
def test_a_long_prompt_is_read_in_as_many_positions_as_a_server_takes(folder, requests, limits):
    with in_process_swarm(folder, "0:2", "2:6", **limits), torch.no_grad():
        model = remote(folder)
        options = {"max_new_tokens": 6, "do_sample": False}
        found = model.generate(IDS[:2], **options)
        model.remote_blocks.close()
        expected = plain_model(folder).generate(IDS[:2], **options)
    assert torch.equal(found, expected)
    steps = [request for request in requests if isinstance(request, Step)]
    assert max(step.hidden.shape[1] for step in steps) == 2
    assert sum(step.hidden.shape[1] for step in steps) == 2 * (LENGTH + 5), "each position once at each of two servers"


@pytest.fixture
def leases(monkeypatch: pytest.MonkeyPatch) -> list[LeaseStore]:
    """What servers in this process keep."""
    stores: list[LeaseStore] = []
    room = LeaseStore.room

    def seen(self: LeaseStore, *args):
        if self not in stores:
            stores.append(self)
        return room(self, *args)

    monkeypatch.setattr(LeaseStore, "room", seen)
    return stores


def left(leases: list[LeaseStore]) -> int:
    """How many leases are kept once those that are on their way back have come."""
    deadline_s = time.monotonic() + 30
    while sum(map(len, leases)) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return sum(map(len, leases))


def test_where_one_micro_batch_fails_the_leases_of_the_others_go_back(folder, leases, monkeypatch):
    reply, forwards, kept = Handler._reply, 0, asyncio.Event()

    async def fail_at_last(self: Handler, client: str, request: Message) -> Message:
        nonlocal forwards
        at_second = isinstance(request, Forward) and request.span.start == 2
        forwards += at_second
        if at_second and forwards == ROWS:
            await kept.wait()
            raise RequestRefused("not this one")
        answer = await reply(self, client, request)
        if at_second:
            kept.set()
        return answer

    monkeypatch.setattr(Handler, "_reply", fail_at_last)
    with in_process_swarm(folder, "0:2", "2:6"):
        model = remote(folder)
        model.remote_blocks.backbone.micro_batch_rows = 1
        with pytest.raises(RequestRefused):
            gradients(model)
        assert len(leases) == 2, "both servers kept some"
        assert left(leases) == 0
        model.remote_blocks.close()


def test_where_a_backward_cannot_begin_its_leases_go_back(folder, leases):
    with in_process_swarm(folder, "0:2", "2:6"):
        model = remote(folder)
        output = model.remote_blocks(torch.randn(ROWS, LENGTH, HIDDEN, requires_grad=True))
        assert sum(map(len, leases)) == 2 * -(-ROWS * LENGTH // 128)
        with pytest.raises(RequestRefused):
            output.backward(torch.full_like(output, torch.nan))
        del output
        assert left(leases) == 0
        model.remote_blocks.close()


def test_an_interrupted_call_of_the_model_is_over(folder, monkeypatch):
    with in_process_swarm(folder, "0:6"):
        model = remote(folder)
        blocks, hidden = model.remote_blocks, torch.randn(1, LENGTH, HIDDEN)
        expected = blocks(hidden)
        with monkeypatch.context() as patch:
            patch.setattr(blocks.backbone, "run", interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(input_ids=IDS[:1], attention_mask=torch.tensor([[0] + [1] * (LENGTH - 1)]))
        torch.testing.assert_close(blocks(hidden), expected)
        model.remote_blocks.close()


def interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose first block puts out hidden states far beyond float16, which the norms behind it make small."""
    folder = tmp_path_factory.mktemp("model") / "large"
    model = plain_model(save_model(folder, "llama"))
    model.model.layers[0].mlp.down_proj.weight.mul_(1e6)
    with torch.no_grad():
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert states[2].abs().max() > 10 * torch.finfo(torch.float16).max
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("wire_format", "tolerance"), [("float16", 5e-3), ("bfloat16", 5e-2)])
def test_shorter_formats_carry_large_states_and_small_gradients(large, wire_format, tolerance):
    """Two servers hold every block: were one of them blamed for infinity, it would be left out."""
    with in_process_swarm(large, "0:1", "1:6", "0:1", "1:6"):
        model = AutoDistributedModelForCausalLM.from_pretrained(
            str(large), initial_peers=[], wire_format=wire_format, grad_format=wire_format
        )
        nets = []
        for each in (model, plain_model(large)):
            torch.manual_seed(0)
            config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
            nets.append(peft.get_peft_model(each, config))
        outputs = [net(input_ids=IDS, labels=IDS, use_cache=False) for net in nets]
        assert relative_error(outputs[0].logits, outputs[1].logits) <= tolerance
        for output in outputs:
            (output.loss / 1e6).backward()  # gradients of which float16 knows none
        found, expected = ([each.grad for each in net.parameters() if each.grad is not None] for net in nets)
        assert all(0 < gradient.abs().max() < 1e-5 for gradient in expected)
        assert max(relative_error(*pair) for pair in zip(found, expected, strict=True)) <= tolerance
        client = model.remote_blocks.backbone.chain.client
        assert (client.stats.retries, client.banned()) == (0, frozenset())
        model.remote_blocks.close()


def test_a_batch_is_cut_into_what_a_server_has_memory_to_compute(folder, requests):
    engine = Engine(load(folder, "2:6"))
    limit = engine.footprint.training_bytes(Pass(span=BlockSpan(2, 6), per_block=True), 2, LENGTH)
    with in_process_swarm(folder, "0:2", "2:6", max_compute_bytes=limit):
        model = remote(folder)
        found = gradients(model)
        model.remote_blocks.close()
    assert max(relative_error(*pair) for pair in zip(found, gradients(plain_model(folder)), strict=True)) <= 1e-5
    sizes = [len(request.hidden) for request in requests if isinstance(request, Forward)]
    assert max(sizes[-4:]) <= 2 < max(sizes)
