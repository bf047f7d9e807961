"""Generation with caches on servers and here: the plain model's tokens, whatever happens on the way."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import RequestRefused, ServerError
from petals_tune.remote import split_session
from petals_tune.swarm.history import Inputs
from petals_tune.tuning.deep_prompt import DeepPromptConfig, with_deep_prompts
from petals_tune.wire.messages import Message, Step
from servers.requests.handler import Handler
from tests.inprocess import in_process_swarm
from tests.models import VOCABULARY, plain_model, save_model
from tests.parity import remote
from tests.raising import raises

LOCAL = ["0:1", "3:4", "5:6"]
ROWS, LENGTH, NEW = 2, 9, 8
IDS = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * LENGTH, [0] * 3 + [1] * (LENGTH - 3)])  # padding on the left
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small Llama; two servers hold each of the remote spans."""
    folder = save_model(tmp_path_factory.mktemp("models") / "llama", "llama")
    with in_process_swarm(folder, "1:3", "4:5", "1:3", "4:5"):
        yield folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return plain_model(folder)


@pytest.fixture
def model(folder: Path) -> Iterator[Any]:
    with remote(AutoDistributedModelForCausalLM, folder, local_blocks=LOCAL, local_quantization="none") as loaded:
        yield loaded


def assert_same(model: Any, plain: Any, ids: torch.Tensor = IDS, **options: Any) -> None:
    found, wanted = (each.generate(ids, **{**OPTIONS, **options}) for each in (model, plain))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "max_new_tokens": 20}], ids=str)
def test_beams_reorder_the_caches_everywhere(model, plain, options):
    assert_same(model, plain, attention_mask=MASK, **options)


def test_a_prompt_is_taken_in_as_many_positions_at_once_as_servers_take(model, plain, monkeypatch):
    monkeypatch.setattr(split_session, "MOST_POSITIONS", 4)
    assert_same(model, plain, attention_mask=MASK)


def test_a_session_goes_back_and_on(model, plain):
    expected = plain(input_ids=IDS).logits
    with torch.no_grad(), model.inference_session(max_length=32) as session:
        for _ in range(2):
            parts = [model(input_ids=part, past_key_values=session).logits for part in IDS.split(4, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)
            session.rollback(4)
            again = model(input_ids=IDS[:, 4:], past_key_values=session).logits
            torch.testing.assert_close(again, expected[:, 4:], rtol=1e-4, atol=1e-4)
            session.rollback(0)
    with model.inference_session(max_length=12), raises(RequestRefused, reason="too long", max_length=13):
        model.generate(IDS, **OPTIONS)


def test_a_head_may_be_trained_on_what_a_session_returns(model):
    """Autograd refuses tensors that were made in inference mode."""
    head = torch.nn.Linear(32, 2)
    with model.inference_session(max_length=32) as session:
        hidden = model.remote_blocks.backbone.open_session(model.remote_blocks, 1, 8, None).step(
            Inputs(hidden=torch.ones(1, 2, 32), padding=None, positions=None),
            position=0,
            order=None,
            device=torch.device("cpu"),
        )
        assert session.position == 0
    head(hidden).sum().backward()
    assert head.weight.grad is not None


@pytest.mark.parametrize("kind", ["lora", "deep prompts"])
def test_adapters_are_on_local_blocks_too(model, folder, kind):
    nets = []
    for each in (model, plain_model(folder)):
        torch.manual_seed(1)
        if kind == "lora":
            config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
            net = peft.get_peft_model(each, config)
        else:
            net = with_deep_prompts(each, DeepPromptConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
        nets.append(net.eval())
    net, local = nets
    ids = IDS[:1]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with model.inference_session(max_length=64):
        for _ in range(2):  # the second turn has the first one in its caches
            # Without a cache: with one, the plain model's deep prompts are added in each step again.
            wanted = local.generate(**given, **OPTIONS, use_cache=False)
            assert torch.equal(net.generate(**given, **OPTIONS), wanted)
            given = {name: torch.cat([value, value], dim=1) for name, value in given.items()}
            if kind == "lora":
                for each in nets:
                    for name, parameter in each.named_parameters():
                        if "lora_B" in name:
                            parameter.data.neg_()


def test_a_server_that_is_lost_is_replaced_and_local_caches_stay(model, plain, monkeypatch):
    reply, steps = Handler._reply, 0

    async def fail_once(self: Handler, client: str, request: Message) -> Message:
        nonlocal steps
        inner = getattr(request, "request", request)
        steps += isinstance(inner, Step)
        if steps in (7, 12) and isinstance(inner, Step):
            steps += 1
            raise ServerError("gone")
        return await reply(self, client, request)

    monkeypatch.setattr(Handler, "_reply", fail_once)
    assert_same(model, plain, num_beams=2, attention_mask=MASK)
    assert model.remote_blocks.stats.retries == 2


def test_rows_are_reordered_once_where_a_step_is_repeated(model, folder, plain):
    """A step that fails in the second span has reordered the first: the next one does not do it again."""
    order = torch.tensor([1, 0])
    with torch.no_grad(), model.inference_session(max_length=32) as session:
        model(input_ids=IDS[:, :4], past_key_values=session)
        session.reorder_cache(order)
        failing = session._session._sessions[1]
        step, failed = failing.step, []

        async def fail(*args: Any, **given: Any) -> torch.Tensor:
            if not failed:
                failed.append(given["order"])
                failing.step = step
                await step(*args, **given)
            raise RequestRefused("no")

        failing.step = fail
        with raises(RequestRefused):
            model(input_ids=IDS[order, 4:5], past_key_values=session)
        assert torch.equal(failed[0], order)
        again = model(input_ids=IDS[order, 4:5], past_key_values=session).logits
    expected = plain(input_ids=IDS[order, :5]).logits[:, 4:]
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
