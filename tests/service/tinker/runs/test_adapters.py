"""Trained adapters over a swarm, against stock PEFT over the plain model."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from petals_tune.errors import ConfigError, DataError
from petals_tune.service.tinker.records import LoRA
from petals_tune.service.tinker.runs import adapters as adapters_module
from petals_tune.service.tinker.runs.adapters import RemoteAdapters, batches
from petals_tune.service.tinker.wire import Datum
from petals_tune.train import chunked_loss
from tests.models import VOCABULARY, plain_model
from tests.raising import raises
from tests.service.tinker.tiny import tiny_swarm

LENGTHS = (5, 9, 2, 9, 1)
MODULES = {
    "llama": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    },
    "bloom": {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head"]},
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc", "lm_head"]},
    "qwen3_moe": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "gemma2": {  # which caps its logits
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    },
}


def texts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCABULARY, (length + 1,), generator=generator).tolist() for length in lengths]
    return [Datum(ids=row[:-1], targets=row[1:], inputs={}) for row in rows]


def reference_logprobs(net, data):
    logits = [net(torch.tensor([each.ids])).logits[0].log_softmax(-1) for each in data]
    return [
        each.gather(1, torch.tensor(datum.targets)[:, None]).flatten() for each, datum in zip(logits, data, strict=True)
    ]


def sum_of(row, logprobs):
    return -(row + 1) * logprobs.sum()  # every text has another weight


def gradients(adapters, name):
    return {key: each.grad.clone() for key, each in adapters.parameters(name).items()}


@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=[pytest.mark.slow] * (each in ("bloom", "gemma2"))) for each in MODULES]
)
def test_initial_values_losses_gradients_and_what_is_saved_are_those_of_stock_peft(family, tmp_path):
    data = texts()
    with tiny_swarm(tmp_path / "model", family) as swarm:
        adapters = RemoteAdapters(swarm.model)
        adapters.create("a", LoRA(rank=4, seed=5))
        torch.manual_seed(5)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, **MODULES[family])
        net = peft.get_peft_model(plain_model(swarm.plain), config)
        expected = {name: each for name, each in net.named_parameters() if each.requires_grad}
        found = adapters.parameters("a")
        assert found.keys() == expected.keys()
        for name, each in found.items():
            assert torch.equal(each, expected[name]), name
        optimizers = [torch.optim.AdamW(each.values(), lr=1e-3) for each in (found, expected)]
        for _ in range(2):
            logprobs = adapters.score("a", data, sum_of, backward=True)
            own = reference_logprobs(net, data)
            for each, other in zip(logprobs, own, strict=True):
                torch.testing.assert_close(each, other.detach(), atol=1e-5, rtol=1e-5)
            sum(sum_of(row, each) for row, each in enumerate(own)).backward()
            for name, each in found.items():
                largest = expected[name].grad.abs().max().item()
                torch.testing.assert_close(each.grad, expected[name].grad, atol=1e-5 * max(largest, 1), rtol=1e-4)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        adapters.save("a", tmp_path / "saved")
        stock = peft.PeftModel.from_pretrained(plain_model(swarm.plain), str(tmp_path / "saved"))
        with torch.no_grad():
            for each, other in zip(reference_logprobs(stock, data), reference_logprobs(net, data), strict=True):
                torch.testing.assert_close(each, other, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    with tiny_swarm(tmp_path_factory.mktemp("model") / "llama", max_tokens=16) as swarm:
        yield RemoteAdapters(swarm.model)


def test_nothing_depends_on_padding_and_on_parts(adapters, monkeypatch):
    """Servers take 16 positions at once: the batch goes there and back in parts; or each text by itself."""
    data = texts((7, 3, 7, 5, 2, 6))
    adapters.create("p", LoRA(rank=4, seed=5))
    together = adapters.score("p", data, sum_of, backward=True), gradients(adapters, "p")
    for each in adapters.parameters("p").values():
        each.grad = None
    monkeypatch.setattr(adapters_module, "MOST_POSITIONS", 1)
    alone = adapters.score("p", data, sum_of, backward=True), gradients(adapters, "p")
    for one, other in zip(together[0], alone[0], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    for name, each in together[1].items():
        torch.testing.assert_close(each, alone[1][name], atol=1e-4, rtol=1e-4)
    assert sorted(each.shape[0] for each in adapters.score("p", data, sum_of, backward=False)) == [2, 3, 5, 6, 7, 7]


def test_the_logits_of_a_batch_never_exist_whole(adapters, monkeypatch):
    monkeypatch.setattr(chunked_loss, "CHUNK_VALUES", 4 * VOCABULARY)
    monkeypatch.setattr(chunked_loss, "KEPT_VALUES", 8 * VOCABULARY)
    monkeypatch.setattr(chunked_loss, "LEAST_CHUNK", 1)
    adapters.create("c", LoRA(rank=4, seed=5))

    class Largest(TorchDispatchMode):
        values: ClassVar[int] = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor) and output.shape[-1:] == (VOCABULARY,) and output.shape[0] != 32:
                Largest.values = max(Largest.values, output.numel())
            return output

    with Largest():
        adapters.score("c", texts((16, 15, 16)), sum_of, backward=True)
    assert 0 < Largest.values <= 8 * VOCABULARY


def test_seeds_do_not_depend_on_other_threads(adapters):
    """Others draw from the process's generator meanwhile."""
    stop = threading.Event()

    def disturb():
        while not stop.is_set():
            torch.manual_seed(1)
            torch.rand(3)

    adapters.create("alone", LoRA(rank=4, seed=9))
    with ThreadPoolExecutor(2) as pool:
        pool.submit(disturb)
        try:
            list(pool.map(lambda name: adapters.create(name, LoRA(rank=4, seed=9)), ["beside"]))
        finally:
            stop.set()
    expected, found = adapters.parameters("alone"), adapters.parameters("beside")
    assert all(torch.equal(each, found[name]) for name, each in expected.items())


def test_prompt_logprobs_are_those_of_the_logits(adapters):
    (text,) = texts((9,))
    adapters.create("l", LoRA(rank=4))
    logits = adapters._model(torch.tensor([text.ids]), adapter="l", use_cache=False).logits[0, :-1].log_softmax(-1)
    own, top = adapters.prompt_logprobs("l", text.ids, 2)
    expected = logits.gather(1, torch.tensor(text.ids[1:])[:, None]).flatten().tolist()
    assert own == pytest.approx(expected, abs=1e-5)
    best = logits.topk(2)
    assert [[token for token, _ in row] for row in top] == best.indices.tolist()
    assert [[value for _, value in row] for row in top] == [
        pytest.approx(row, abs=1e-5) for row in best.values.tolist()
    ]


def test_what_does_not_fit_is_refused(adapters, tmp_path):
    adapters.create("small", LoRA(rank=2))
    adapters.create("large", LoRA(rank=4))
    adapters.save("small", tmp_path / "small")
    with raises(ConfigError, key="path"):
        adapters.load("large", tmp_path / "small")
    (tmp_path / "small" / "adapter_model.safetensors").write_bytes(b"damaged")
    with raises(ConfigError, key="path"):
        adapters.load("small", tmp_path / "small")
    for column, datum in (
        ("model_input", Datum(ids=[VOCABULARY], targets=[1], inputs={})),
        ("target_tokens", Datum(ids=[1], targets=[-1], inputs={})),
    ):
        with raises(DataError, column=column):
            adapters.score("small", [datum], sum_of, backward=False)


def test_texts_of_like_length_are_computed_together():
    assert list(batches([5, 1, 4, 9, 1], 8)) == [[1, 4], [2], [0], [3]]
    assert list(batches([2, 2, 2], 6)) == [[0, 1, 2]]
    assert list(batches([], 6)) == []
