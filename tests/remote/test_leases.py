"""Kept graphs over real servers: they save work, they never change a number, and none is left lying around."""

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import peft
import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM, local_swarm
from petals_tune.blocks.engine import Engine
from tests.models import VOCABULARY, plain_model, relative_error, save_model
from tests.servers.parts import forward, load

pytestmark = pytest.mark.swarm
MICRO_BATCHES, LENGTH, PROMPT, WIDTH = 8, 6, 3, 32
SOME, FEW = 3, 2  # whole graphs that fit
INPUTS = 4  # inputs of the blocks that fit into what is left


def swarm(folder, limit: str):
    return local_swarm(str(folder), spans=["0:6"], quantization="none", overrides=[limit])


class Bench:
    """One small model: in this process, and on servers with different limits."""

    def __init__(self, folder, stack: ExitStack):
        self.plain = plain_model(folder)
        engine = Engine(load(folder, "0:6"))
        hidden = torch.randn(1, PROMPT + LENGTH, WIDTH)
        request = forward("0:6", hidden, keep=True, train=True)
        graph_bytes, input_bytes = (
            engine.forward(request, None, per_block=per_block).graph_bytes for per_block in (False, True)
        )
        assert 0.5 * graph_bytes // input_bytes == INPUTS
        lease_gb = graph_bytes / 2**30
        limits = {
            "ample": "limits.max_lease_gb=1",
            "some": f"limits.max_lease_gb={(SOME + 0.5) * lease_gb}",
            "few": f"limits.max_lease_gb={(FEW + 0.5) * lease_gb}",
            "none": "limits.max_lease_gb=0",
            "short": "limits.max_lease_age_s=0.000001",
        }
        stacks = [stack.enter_context(ExitStack()) for _ in limits]
        with ThreadPoolExecutor() as pool:
            starts = [
                pool.submit(
                    own.enter_context, local_swarm(str(folder), spans=["0:6"], quantization="none", overrides=[o])
                )
                for own, o in zip(stacks, limits.values(), strict=True)
            ]
            peers = [start.result() for start in starts]
        self.remote = {}
        for name, addresses in zip(limits, peers, strict=True):
            model = AutoDistributedModelForCausalLM.from_pretrained(
                str(folder), initial_peers=addresses, micro_batch_rows=1
            )
            stack.callback(model.remote_blocks.close)
            self.remote[name] = model
        ids = torch.randint(VOCABULARY, (MICRO_BATCHES, LENGTH), generator=torch.Generator().manual_seed(2))
        self.batch = {"input_ids": ids, "labels": ids}
        self.expected = self.gradient(self.net("plain"))

    def net(self, name: str) -> peft.PeftModel:
        torch.manual_seed(1)
        model = self.plain if name == "plain" else self.remote[name]
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT)
        return peft.get_peft_model(model, config).train()

    def gradient(self, net: peft.PeftModel) -> torch.Tensor:
        net(**self.batch).loss.backward()
        return taken(net)

    def recomputed(self, name: str) -> int:
        """How many backwards had no lease since the last question."""
        stats = self.remote[name].remote_blocks.stats
        count, stats.recomputations = stats.recomputations, 0
        return count


def taken(net: peft.PeftModel) -> torch.Tensor:
    (parameter,) = [p for p in net.parameters() if p.requires_grad]
    gradient, parameter.grad = parameter.grad, None
    return gradient


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(save_model(tmp_path_factory.mktemp("models"), "bloom"), stack)


@pytest.mark.parametrize(
    ("limits", "recomputed"),
    [
        ("ample", 0),
        ("some", MICRO_BATCHES - SOME - INPUTS),
        ("few", MICRO_BATCHES - FEW - INPUTS),
        ("none", MICRO_BATCHES),
        ("short", MICRO_BATCHES),
    ],
)
def test_a_gradient_is_the_same_whatever_was_kept_and_what_fits_is_used(bench, limits, recomputed):
    net = bench.net(limits)
    bench.recomputed(limits)
    for _ in range(2):
        assert relative_error(bench.gradient(net), bench.expected) <= 1e-5
        assert bench.recomputed(limits) == recomputed


def test_a_second_backward_through_the_same_graph_gives_the_same_gradient(bench):
    net = bench.net("ample")
    loss = net(**bench.batch).loss
    loss.backward(retain_graph=True)
    first = taken(net)
    assert bench.recomputed("ample") == 0
    loss.backward()
    assert bench.recomputed("ample") == MICRO_BATCHES
    torch.testing.assert_close(taken(net), first, rtol=0, atol=0)


def test_evaluation_leaves_no_leases(bench):
    net = bench.net("some")
    with torch.no_grad():
        net(**bench.batch)
    net.requires_grad_(False)
    net(**bench.batch)
    assert relative_error(bench.gradient(bench.net("some")), bench.expected) <= 1e-5
    assert bench.recomputed("some") == MICRO_BATCHES - SOME - INPUTS


def test_a_loss_that_is_never_backpropagated_gives_its_leases_back(bench):
    net = bench.net("some")
    bench.recomputed("some")
    dropped = net(**bench.batch).loss
    del dropped
    gc.collect()
    bench.gradient(net)
    assert bench.recomputed("some") == MICRO_BATCHES - SOME - INPUTS


def test_gradients_are_accumulated_over_several_forwards_at_once(bench):
    net = bench.net("ample")
    losses = [
        net(**{name: part[rows] for name, part in bench.batch.items()}).loss for rows in (slice(0, 3), slice(3, 8))
    ]
    (3 / 8 * losses[0] + 5 / 8 * losses[1]).backward()
    assert relative_error(taken(net), bench.expected) <= 1e-5
    assert bench.recomputed("ample") == 0
