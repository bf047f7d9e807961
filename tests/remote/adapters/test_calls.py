"""The adapter as an argument of a call: the numbers of in-process PEFT, in one thread and in several."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import peft
import pytest
import torch

from petals_tune.errors import ConfigError
from tests.models import relative_error
from tests.raising import raises
from tests.remote.adapters.conftest import IDS, METHODS, NAMES, TASK, generated


def logits(net, ids: torch.Tensor, **options) -> torch.Tensor:
    with torch.no_grad():
        return net(input_ids=ids, use_cache=False, **options).logits


@pytest.mark.parametrize("name", NAMES)
def test_a_call_with_an_adapter_gives_the_numbers_of_peft(saved, shared, name):
    plain = saved.plain(name)
    assert relative_error(logits(shared, IDS, adapter=name), logits(plain, IDS)) <= 1e-5
    # With a cache, local blocks have no deep prompts.
    expected = generated(plain, IDS[:2], use_cache=name != "deep")
    assert torch.equal(generated(shared, IDS[:2], adapter=name), expected)


def test_adapters_differ(shared):
    found = [logits(shared, IDS, adapter=name)[:, -1] for name in NAMES]
    for number, one in enumerate(found):
        assert all(relative_error(one, other) > 1e-3 for other in found[number + 1 :])


def test_threads_with_different_adapters_get_what_each_gets_alone(saved, shared):
    """Generation and training at once: tokens, logits and gradients, to the last bit."""
    nets = {name: shared.adapters.add(f"trained {name}", config()) for name, config in METHODS.items()}
    begin = Barrier(2 * len(NAMES))

    def generate(name: str | None) -> tuple[torch.Tensor, ...]:
        return generated(shared, IDS[:2], adapter=name), logits(shared, IDS[:2], adapter=name)

    def train(name: str | None) -> tuple[torch.Tensor, ...]:
        if name is None:
            return (logits(shared, IDS, adapter=None),)
        own = [parameter for parameter in nets[name].parameters() if parameter.requires_grad]
        loss = shared(input_ids=IDS[:3], labels=IDS[:3], adapter=f"trained {name}").loss
        return loss.detach(), *torch.autograd.grad(loss, own)

    work: list[tuple[Callable, str | None]] = [(task, name) for task in (generate, train) for name in NAMES]
    alone = [task(name) for task, name in work]

    def at_once(number: int) -> list[tuple[torch.Tensor, ...]]:
        begin.wait()
        return [work[number][0](work[number][1])]

    with ThreadPoolExecutor(len(work)) as pool:
        together = list(pool.map(at_once, range(len(work))))
    for name in METHODS:
        shared.adapters.remove(f"trained {name}")
    for expected, rounds in zip(alone, together, strict=True):
        for found in rounds:
            for one, other in zip(found, expected, strict=True):
                assert relative_error(one.float(), other.float()) <= 1e-6


@pytest.mark.parametrize("config", ["lora", "ia3"])
def test_a_stock_peft_model_with_several_adapters(saved, model, config):
    """`load_adapter` and `add_adapter` of PEFT itself; its active adapter stays what it is."""
    net = peft.get_peft_model(model, METHODS[config](), adapter_name="first").eval()
    names = {"lora": ["lora", "head"], "ia3": ["ia3"]}[config]
    for name in names:
        net.load_adapter(str(saved.folders[name]), adapter_name=name)
    before = logits(net, IDS)
    for name in (*names, None):
        plain = saved.plain(name)
        assert relative_error(logits(net, IDS, adapter=name), logits(plain, IDS)) <= 1e-5
        assert torch.equal(generated(net, IDS[:1], adapter=name), generated(plain, IDS[:1]))
        with net.disable_adapter():
            assert relative_error(logits(net, IDS, adapter=name), logits(plain, IDS)) <= 1e-5
    expected = [logits(net, IDS, adapter=name) for name in names]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda name: logits(net, IDS, adapter=name), 4 * names))
    for number, found in enumerate(together):
        assert relative_error(found, expected[number % len(names)]) <= 1e-6
    assert torch.equal(logits(net, IDS), before)
    assert net.active_adapter == "first"


def test_soft_prompts_of_a_stock_peft_model(saved, model):
    net = peft.get_peft_model(model, peft.PromptTuningConfig(task_type=TASK, num_virtual_tokens=2), adapter_name="one")
    net.load_adapter(str(saved.folders["prompt"]), adapter_name="prompt")
    with raises(ConfigError, key="inputs_embeds"):
        net(input_ids=IDS, adapter="prompt")
    with raises(ConfigError, key="adapter", seen="prompt"):
        model(input_ids=IDS, adapter="prompt")
    model.adapters.adopt(net)
    for name in ("prompt", None):
        plain = saved.plain(name)
        assert relative_error(logits(model, IDS, adapter=name), logits(plain, IDS)) <= 1e-5
        assert torch.equal(generated(net, IDS[:1], adapter=name), generated(plain, IDS[:1]))
    assert relative_error(logits(model, IDS, adapter="one"), logits(net, IDS)) <= 1e-6


def test_a_session_begins_anew_with_another_adapter(saved, shared):
    """Also with another soft prompt, of which the servers know nothing."""
    with shared.inference_session(max_length=32):
        for name in ("prompt", "deep", None):
            first = generated(shared, IDS[:1], adapter=name)
            assert torch.equal(first, generated(saved.plain(name), IDS[:1], use_cache=name != "deep")), name
            sent = shared.remote_blocks.stats.sent_bytes
            assert torch.equal(generated(shared, first, adapter=name)[:, : first.shape[1]], first)
            assert shared.remote_blocks.stats.sent_bytes > sent
    with shared.remote_blocks.new_session(16) as session, torch.no_grad():
        shared(input_ids=IDS[:1], past_key_values=session, adapter="prompt")
        with raises(ConfigError, key="past_key_values"):
            shared(input_ids=IDS[:1, :1], past_key_values=session, adapter=None)


def test_what_is_no_adapter_here_is_refused_by_name(saved, shared):
    for wrong in ("nobody", str(saved.folders["lora"]), 3):
        with raises(ConfigError, key="adapter", seen=wrong):
            shared(input_ids=IDS, adapter=wrong)
        with raises(ConfigError, key="adapter", seen=wrong):
            shared.generate(IDS, adapter=wrong)
    with raises(ConfigError, key="adapters"):
        shared(input_ids=IDS, adapter="lora", adapters=NAMES)
