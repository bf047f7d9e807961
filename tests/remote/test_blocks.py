"""The remote blocks as a module, over two real servers."""

from collections.abc import Callable, Iterator

import peft
import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import ConfigError, RequestRefused, SwarmError, SwarmMismatch
from petals_tune.model.checkpoint import Checkpoint
from tests.models import BLOCKS, VOCABULARY, plain_model, relative_error, save_model
from tests.raising import raises
from tests.remote.conftest import Swarms

pytestmark = pytest.mark.swarm
IDS = torch.randint(VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def swarms(start_swarms: Callable) -> Iterator[Swarms]:
    with start_swarms("llama", ["0:3", "3:6"]) as started:
        yield started


def hidden_states(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 8, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (2, 4), (0, 1), (5, 6)])
def test_a_slice_runs_its_blocks_and_gives_the_gradient_at_its_input(swarms, start, stop):
    grad = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(2))
    base = swarms.plain.model
    inputs, outputs = [hidden_states().requires_grad_(), hidden_states().requires_grad_()], []
    outputs.append(swarms.remote(2).remote_blocks[start:stop](inputs[0]))
    positions = torch.arange(8)[None]
    rotary = base.rotary_emb(hidden_states(), positions)
    mask = torch.full((8, 8), -torch.inf).triu(1)[None, None]
    plain = inputs[1]
    for block in base.layers[start:stop]:
        plain = block(plain, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
    outputs.append(plain)
    for output in outputs:
        output.backward(grad)
    assert relative_error(outputs[0], outputs[1]) <= 1e-5
    assert relative_error(inputs[0].grad, inputs[1].grad) <= 1e-5


@pytest.mark.parametrize("index", [slice(3, 3), slice(4, 2), slice(0, 6, 2)], ids=str)
def test_a_slice_that_is_no_span_is_refused(swarms, index):
    with raises(ConfigError, key="remote_blocks", seen=index):
        swarms.remote(2).remote_blocks[index]


def test_a_second_backward_gives_the_same_gradients(swarms):
    """The servers' graphs are spent by the first one; the second is computed again."""
    model, hidden = swarms.remote(2), hidden_states().requires_grad_()
    before = model.remote_blocks.stats.recomputations
    output = model.remote_blocks[:](hidden).square().sum()
    output.backward(retain_graph=True)
    first, hidden.grad = hidden.grad, None
    assert model.remote_blocks.stats.recomputations == before
    output.backward()
    assert torch.equal(hidden.grad, first)
    assert model.remote_blocks.stats.recomputations > before


def test_a_second_order_gradient_is_refused(swarms):
    hidden = hidden_states().requires_grad_()
    output = swarms.remote(2).remote_blocks[0:2](hidden).square().sum()
    (grad,) = torch.autograd.grad(output, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_the_cut_into_micro_batches_does_not_change_the_numbers(swarms, rows):
    model = swarms.remote(2)
    ids = torch.randint(VOCABULARY, (7, 8), generator=torch.Generator().manual_seed(3))
    kept = model.remote_blocks.backbone.micro_batch_rows
    try:
        model.remote_blocks.backbone.micro_batch_rows = rows
        with torch.no_grad():
            assert relative_error(model(ids).logits, swarms.plain(ids).logits) <= 1e-5
    finally:
        model.remote_blocks.backbone.micro_batch_rows = kept


def test_graphs_of_outputs_that_are_thrown_away_are_given_back(swarms):
    """More forwards than any budget holds, without a backward: the last one still finds its graph kept."""
    model, hidden = swarms.remote(2), hidden_states()
    for _ in range(20):
        model.remote_blocks[:](hidden.clone().requires_grad_())
    before = model.remote_blocks.stats.recomputations
    last = hidden.clone().requires_grad_()
    model.remote_blocks[:](last).sum().backward()
    assert last.grad is not None
    assert model.remote_blocks.stats.recomputations == before


def test_evaluation_asks_for_no_gradients_and_sends_less(swarms):
    model, stats = swarms.remote(2), swarms.remote(2).remote_blocks.stats
    before = stats.sent_bytes
    with torch.no_grad():
        model(IDS)
    evaluated, before = stats.sent_bytes - before, stats.sent_bytes
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    tuned(IDS, labels=IDS).loss.backward()
    assert stats.sent_bytes - before > 1.5 * evaluated > 0
    assert stats.calls > 0
    assert stats.wait_s > 0


@pytest.mark.parametrize("wire_format", ["float16", "bfloat16", "blockwise8"])
def test_a_shorter_wire_format_sends_less_and_gives_nearly_the_same(swarms, wire_format):
    model = AutoDistributedModelForCausalLM.from_pretrained(
        str(swarms.folder), initial_peers=swarms.peers[2], wire_format=wire_format, grad_format=wire_format
    )
    try:
        remote, plain = hidden_states().requires_grad_(), hidden_states().requires_grad_()
        output = model.remote_blocks[:](remote)
        wanted = swarms.remote(2).remote_blocks[:](plain)
        assert 0 < relative_error(output, wanted) < 0.05
        output.sum().backward()
        wanted.sum().backward()
        assert relative_error(remote.grad, plain.grad) < 0.1
    finally:
        model.remote_blocks.close()


def test_the_model_holds_no_weights_of_the_blocks(swarms):
    model = swarms.remote(2)
    assert not any(".layers." in name for name in model.state_dict())
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    whole = sum(p.untyped_storage().nbytes() for p in plain_model(swarms.folder).parameters())
    outside = 4 * (2 * VOCABULARY * 32 + 32)
    assert sum(held.values()) < outside + 4096 < whole
    assert len(model.remote_blocks) == model.config.num_hidden_layers == BLOCKS


def test_another_model_than_the_swarms_is_refused_by_name(swarms, tmp_path):
    other = save_model(tmp_path / "other", "llama", hidden_size=64)
    with raises(SwarmMismatch, wanted=Checkpoint(str(other)).digest, found=(Checkpoint(str(swarms.folder)).digest,)):
        AutoDistributedModelForCausalLM.from_pretrained(str(other), initial_peers=swarms.peers[2])


def test_a_gradient_that_is_not_finite_is_refused_at_once(swarms):
    output = swarms.remote(2).remote_blocks[:](hidden_states().requires_grad_())
    with raises(RequestRefused, reason="gradient not finite"):
        output.backward(torch.full_like(output, float("nan")))


def test_a_model_that_has_left_the_swarm_says_so(swarms):
    model = AutoDistributedModelForCausalLM.from_pretrained(str(swarms.folder), initial_peers=swarms.peers[2])
    model.remote_blocks.close()
    with raises(SwarmError):
        model(IDS)
