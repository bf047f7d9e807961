import math
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from petals_tune.data.collate import Batch, collate
from petals_tune.data.rows import IGNORED, Row
from petals_tune.train import chunked_loss, objective
from petals_tune.train.chunked_loss import chunked_cross_entropy, chunked_logprobs
from petals_tune.train.objective import CausalLM
from tests.models import FAMILIES, VOCABULARY, config_of, relative_error

LENGTHS, CONTEXT = (11, 5, 9), 2  # the first two tokens of a row are not supervised
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {},
    "trained head": {"modules_to_save": ["lm_head"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "trained tied weights": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}
FAMILY_OF = {"trained tied weights": "llama tied"}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of five positions."""
    monkeypatch.setattr(chunked_loss, "CHUNK_VALUES", 5 * VOCABULARY)
    monkeypatch.setattr(chunked_loss, "LEAST_CHUNK", 1)


def rows() -> Batch:
    made = []
    for length in LENGTHS:
        ids = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        made.append(Row(input_ids=ids, labels=[IGNORED] * CONTEXT + ids[CONTEXT:]))
    return collate(made, pad_id=0)


def net_of(family: str, *, train: bool = False, **lora: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family)).requires_grad_(False)
    options: dict[str, Any] = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **lora}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).train(train)


def whole_loss(net: Any, batch: Batch) -> torch.Tensor:
    """Of all logits, from the library's own forward."""
    logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)


def gradients(net: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trained = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: grad for name, grad in zip(trained, found, strict=True) if grad is not None}


def check_equal(net: Any) -> None:
    expected, scores = whole_loss(net, rows()), CausalLM()(net, rows())
    assert scores.count == sum(LENGTHS) - CONTEXT * len(LENGTHS)
    assert relative_error(scores.loss, expected) < 1e-6
    right, found = gradients(net, expected), gradients(net, scores.loss)
    assert right.keys() == found.keys()
    largest = max(gradient.norm() for gradient in right.values())  # others are sums of large terms that cancel
    for name, gradient in right.items():
        assert (found[name] - gradient).norm() < 1e-5 * largest, name  # rounding, through six blocks of large weights
    with torch.no_grad():
        assert relative_error(CausalLM()(net, rows()).loss, expected) < 1e-6


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_a_heads_loss_and_gradients_are_those_of_the_plain_loss(bias: bool, chunk: int) -> None:
    torch.manual_seed(0)
    head, targets = nn.Linear(16, 40, bias=bias), torch.randint(40, (12,))
    hidden = torch.randn(12, 16, requires_grad=True)
    inputs = [hidden, *head.parameters()]
    expected = F.cross_entropy(torch.tanh(head(hidden)), targets)
    right = torch.autograd.grad(expected, inputs)
    loss = chunked_cross_entropy(head, torch.tanh, hidden, targets, chunk=chunk)
    assert relative_error(loss, expected) < 1e-6
    for gradient, exact in zip(torch.autograd.grad(loss, inputs), right, strict=True):
        assert relative_error(gradient, exact) < 1e-6


@pytest.mark.parametrize(("chunk", "kept"), [(5, 12), (5, 11), (1, 0), (12, 0)])
def test_log_probabilities_have_each_a_gradient_of_its_own(
    chunk: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve positions whose logits are kept for the backward, or computed again there."""
    monkeypatch.setattr(chunked_loss, "CHUNK_VALUES", chunk * 40)
    monkeypatch.setattr(chunked_loss, "LEAST_CHUNK", 1)
    monkeypatch.setattr(chunked_loss, "KEPT_VALUES", kept * 40)
    torch.manual_seed(0)
    head, targets, weights = nn.Linear(16, 40), torch.randint(40, (12,)), torch.randn(12)
    hidden = torch.randn(12, 16, requires_grad=True)
    inputs = [hidden, *head.parameters()]
    expected = torch.tanh(head(hidden)).log_softmax(-1)[torch.arange(12), targets]
    right = torch.autograd.grad((weights * expected.exp()).sum(), inputs, retain_graph=True)
    found = chunked_logprobs(head, torch.tanh, hidden, targets, vocabulary=40)
    torch.testing.assert_close(found, expected)
    for gradient, exact in zip(torch.autograd.grad((weights * found.exp()).sum(), inputs), right, strict=True):
        assert relative_error(gradient, exact) < 1e-6
    with torch.no_grad():
        torch.testing.assert_close(chunked_logprobs(head, torch.tanh, hidden, targets, vocabulary=40), expected)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.usefixtures("small_chunks")
def test_loss_and_gradients_are_those_of_all_logits(adapter: str) -> None:
    net = net_of(FAMILY_OF.get(adapter, "llama"), **ADAPTERS[adapter])
    if adapter == "trained tied weights":
        head: Any = net.get_output_embeddings()
        assert any(parameter.requires_grad for parameter in head.parameters())
    check_equal(net)


# A cap, a cap beside a width of its own, a factor, a divisor.
@pytest.mark.parametrize("family", ["gemma2", "nanochat", "cohere", "granite"])
@pytest.mark.usefixtures("small_chunks", "no_whole_logits")
def test_what_families_do_with_logits_is_done_to_chunks(family: str) -> None:
    check_equal(net_of(family))


@pytest.fixture
def no_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(objective, "supervised_logits")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("small_chunks", "no_whole_logits")
def test_every_family_is_known(family: str) -> None:
    check_equal(net_of(family, target_modules="all-linear"))


def test_a_cap_shows_where_logits_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a name for the cap in the config, identity is refused, though it is close to it."""
    net = net_of("gemma2")
    with torch.no_grad():
        net.get_output_embeddings().weight.mul_(0.01)
    expected = whole_loss(net, rows())
    monkeypatch.setattr(objective, "functions_after_head", lambda config: [lambda logits: logits])
    loss = CausalLM()(net, rows()).loss
    assert net.get_base_model() in objective._UNKNOWN_AFTER_HEAD
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_a_model_that_is_not_known_gets_the_random_numbers_of_one_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "functions_after_head", lambda config: [])
    net = net_of("llama", train=True, lora_dropout=0.5)
    losses = []
    for _ in range(2):  # at first it is not known that it is not known
        torch.manual_seed(3)
        losses.append(CausalLM()(net, rows()).loss)
        losses.append(torch.rand(()))
    assert losses[0] == losses[2]
    assert losses[1] == losses[3]


class LargestTensor(TorchDispatchMode):
    """Records the most values of any tensor that an operation returns."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for each in output if isinstance(output, tuple | list) else [output]:
            if isinstance(each, torch.Tensor):
                self.values = max(self.values, each.numel())
        return output


@pytest.mark.parametrize("train", [True, False])
def test_the_logits_never_exist_whole(train: bool) -> None:
    positions, vocabulary, width, chunk = 64, 512, 16, 8
    hidden = torch.randn(positions, width, requires_grad=True)
    targets = torch.randint(vocabulary, (positions,))
    head = nn.Linear(width, vocabulary)
    identity = partial(torch.mul, other=1.0)
    with LargestTensor() as largest, torch.set_grad_enabled(train):
        loss = chunked_cross_entropy(head, identity, hidden, targets, chunk=chunk)
        if train:
            loss.backward()
    assert largest.values == max(chunk, width) * vocabulary  # of a chunk's logits, or of the head's own weight
    with LargestTensor() as largest, torch.set_grad_enabled(train):
        F.cross_entropy(head(hidden), targets)
    assert largest.values == positions * vocabulary


def test_a_gradient_that_the_mean_makes_too_small_for_float16_is_kept() -> None:
    """As under a loss scaler, whose factor comes with the backward."""
    positions, vocabulary, width, scale = 512, 256, 8, 2.0**16
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary).requires_grad_(False)
    hidden, targets = torch.randn(positions, width), torch.randint(vocabulary, (positions,))
    found = {}
    for kind in (torch.float32, torch.float16):
        given = hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype=kind, enabled=kind is torch.float16):
            loss = chunked_cross_entropy(head, lambda logits: logits, given, targets, chunk=100)
        (loss * scale).backward()
        assert given.grad is not None
        found[kind] = given.grad / scale
    assert relative_error(found[torch.float16], found[torch.float32]) < 2e-3


def test_a_gradient_is_the_same_the_second_time() -> None:
    head, hidden = nn.Linear(4, 8), torch.randn(6, 4, requires_grad=True)
    loss = chunked_cross_entropy(head, lambda logits: logits, hidden, torch.arange(6), chunk=4)
    first = torch.autograd.grad(loss, [hidden, head.weight], retain_graph=True)
    second = torch.autograd.grad(loss * 2, [hidden, head.weight])
    for one, two in zip(first, second, strict=True):
        assert torch.equal(2 * one, two)


def test_a_loss_that_is_not_finite_is_seen() -> None:
    head, hidden = nn.Linear(4, 8), torch.full((6, 4), math.nan)
    assert chunked_cross_entropy(head, lambda logits: logits, hidden, torch.arange(6), chunk=4).isnan()
