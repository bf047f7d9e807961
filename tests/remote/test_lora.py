"""LoRA and deep prompts on remote blocks: summed on the servers, owned by the client."""

from collections.abc import Callable, Iterator

import msgspec
import peft
import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import ServerError, UnsupportedAdapter
from petals_tune.remote import function
from petals_tune.swarm.sender import Sender
from petals_tune.swarm.sums import AdapterSums
from petals_tune.tuning.deep_prompt import DeepPromptConfig, load_deep_prompts, save_deep_prompts, with_deep_prompts
from petals_tune.wire.messages import CollectedSum, Gradients
from tests.models import VOCABULARY, relative_error
from tests.raising import raises
from tests.remote.conftest import Swarms

pytestmark = pytest.mark.swarm
TOLERANCE = 1e-5
ROWS, LENGTH, PROMPT = 8, 7, 3
UP = "dense_h_to_4h|c_fc"  # the first linear of the MLP, in BLOOM and in GPT-2


@pytest.fixture(scope="module", params=["bloom", "gpt2"])
def swarms(request: pytest.FixtureRequest, start_swarms: Callable) -> Iterator[Swarms]:
    with start_swarms(request.param, ["0:2", "2:6"]) as started:
        yield started


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def lora(**options) -> peft.LoraConfig:
    defaults = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    return peft.LoraConfig(**{**defaults, **options})


def gradients(net: peft.PeftModel) -> dict[str, torch.Tensor]:
    """Of one step, in training mode."""
    net.train()(**batch()).loss.backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    net.zero_grad()
    return found


def lora_gradients(model, rows: int | None = None, **options) -> dict[str, torch.Tensor]:
    """Of a fresh LoRA, which is taken off again."""
    torch.manual_seed(1)
    net = peft.get_peft_model(model, lora(**options))
    if rows is not None:
        model.remote_blocks.backbone.micro_batch_rows = rows
    found = gradients(net)
    net.unload()
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) <= TOLERANCE, name


@pytest.mark.parametrize("rows", [8, 2], ids=lambda rows: f"{ROWS // rows} micro-batches")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_pattern": {UP: 2}, "alpha_pattern": {UP: 5}, "use_rslora": True},
        {"layers_to_transform": [2, 5], "target_modules": ["dense_h_to_4h", "c_fc"]},
        {"target_modules": r".*\.(3|4)\.mlp\.(dense|c)_\w+"},
    ],
    ids=["all-linear", "patterns", "two blocks", "regex"],
)
def test_gradients_are_those_of_stock_peft(swarms, rows, options):
    assert_same(lora_gradients(swarms.remote(2), rows, **options), lora_gradients(swarms.plain, **options))


def test_sums_are_the_same_every_time(swarms):
    once, again = [lora_gradients(swarms.remote(2), 1) for _ in range(2)]
    for name, gradient in once.items():
        torch.testing.assert_close(again[name], gradient, rtol=0, atol=0)


@pytest.mark.parametrize("fault", ["lost", "a stranger's term", "a stranger's term, with a backward"])
def test_a_sum_that_is_lost_or_not_ours_is_computed_again(swarms, fault, monkeypatch):
    model, ask, hit = swarms.remote(2), Sender.ask, []
    if "backward" not in fault:  # it comes with the last backward, and nobody asks for it, unless nobody expects it
        monkeypatch.setattr(function, "AdapterSums", lambda count: AdapterSums())

    async def failing(self, hop, request, context=None, **given):
        reply = await ask(self, hop, request, context, **given)
        if isinstance(reply, CollectedSum) or (isinstance(reply, Gradients) and reply.terms):
            if hit:
                return reply
            hit.append(hop)
            if fault == "lost":
                raise ServerError("gone")
            assert isinstance(reply, CollectedSum) != ("backward" in fault)
            return msgspec.structs.replace(reply, terms=reply.terms + 1)
        return reply

    monkeypatch.setattr(Sender, "ask", failing)
    found = lora_gradients(model, 2)
    assert len(hit) == 1
    assert_same(found, lora_gradients(swarms.plain))


def test_an_upload_and_a_sum_travel_once_a_step_however_many_micro_batches(swarms):
    model = swarms.remote(2)
    stats = model.remote_blocks.stats
    sizes = []
    for rows in (4, 1):
        before = stats.sent_bytes + stats.received_bytes
        lora_gradients(model, rows)
        sizes.append(stats.sent_bytes + stats.received_bytes - before)
    adapter = sum(p.numel() * 4 for p in lora_gradients(swarms.plain).values())
    assert sizes[1] - sizes[0] < adapter / 2, (sizes, adapter)


def test_dropout_is_the_same_when_a_graph_was_lost(swarms):
    """retain_graph: the second backward runs the forward again, with the same masks."""
    torch.manual_seed(1)
    net = peft.get_peft_model(swarms.remote(2), lora(lora_dropout=0.5)).train()
    loss = net(**batch()).loss
    found = []
    for retain in (True, False):
        loss.backward(retain_graph=retain)
        found.append({name: p.grad for name, p in net.named_parameters() if p.requires_grad})
        net.zero_grad()
    net.unload()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=0)


def test_an_adapter_that_changed_after_its_forward_is_noticed_as_torch_does(swarms):
    net = peft.get_peft_model(swarms.remote(2), lora()).train()
    loss = net(**batch()).loss
    with torch.no_grad():
        next(p for p in net.parameters() if p.requires_grad).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    net.unload()


def test_two_clients_with_different_adapters_do_not_mix(swarms):
    other = AutoDistributedModelForCausalLM.from_pretrained(str(swarms.folder), initial_peers=swarms.peers[2])
    nets = []
    for seed, model in enumerate((swarms.remote(2), other, swarms.plain)):
        torch.manual_seed(seed % 2)
        nets.append(peft.get_peft_model(model, lora()).train())
    losses = [net(**batch()).loss for net in nets[:2]]
    losses[1].backward()
    losses[0].backward()
    found = [{name: p.grad for name, p in net.named_parameters() if p.requires_grad} for net in nets[:2]]
    assert_same(found[0], gradients(nets[2]))
    name = next(iter(found[0]))
    assert relative_error(found[1][name], found[0][name]) > 1e-2
    for net in nets:
        net.unload()
    other.remote_blocks.close()


def test_twenty_steps_stay_on_the_curve_of_one_process(swarms):
    curves = []
    for model in (swarms.remote(2), swarms.plain):
        torch.manual_seed(1)
        net = peft.get_peft_model(model, lora(init_lora_weights=True)).train()
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=3e-3)
        curves.append([])
        for number in range(20):
            loss = net(**batch(number % 2)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curves[-1].append(loss.item())
        net.unload()
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][-1] < curves[0][0]


def test_what_a_server_would_not_run_is_refused_before_any_traffic(swarms):
    model = swarms.remote(2)
    net = peft.get_peft_model(model, lora(lora_bias=True))
    before = model.remote_blocks.stats.sent_bytes
    with raises(UnsupportedAdapter, key="tuning.lora_bias"):
        net(**batch())
    assert model.remote_blocks.stats.sent_bytes == before
    net.unload()


def test_deep_prompts_train_as_on_a_local_model_and_load_again(swarms, tmp_path):
    nets = []
    for model in (swarms.remote(2), swarms.plain):
        torch.manual_seed(1)
        net = with_deep_prompts(model, DeepPromptConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT))
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.requires_grad and parameter.shape == (PROMPT, 32):
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        nets.append(net)
    found, expected = (gradients(net) for net in nets)
    assert len(expected) == 1 + 6, "the soft prompt, and one in each block"
    assert_same(found, expected)

    save_deep_prompts(nets[0].get_base_model(), tmp_path)
    with torch.no_grad():
        logits = nets[0].eval()(**batch()).logits
    for model in (swarms.remote(2), swarms.plain):
        for block in model.remote_blocks.children() if model is not swarms.plain else []:
            block.deep_prompt.prompt.data.zero_()
    load_deep_prompts(swarms.remote(2), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(nets[0](**batch()).logits, logits, rtol=0, atol=0)
    for model in (swarms.remote(2), swarms.plain):  # the next test finds the model as it was
        remove(model)


def remove(model) -> None:
    for module in list(model.modules()):
        if "deep_prompt" in module._modules:  # remote blocks answer for their first one
            del module.deep_prompt
            module._forward_pre_hooks.clear()
