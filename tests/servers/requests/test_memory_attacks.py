"""Requests that would take more memory than is set aside: refused before they take it, and the honest one beside them
gets the numbers that it gets alone."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from petals_tune.blocks.adapters import MAX_PARTS_A_MODULE
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.footprint import Pass
from petals_tune.errors import RequestRefused, ServerBusy
from petals_tune.wire.messages import Backward, CollectSum, Done, Forward, Forwarded, OpenSession, Step
from servers.requests.admission import Admission
from servers.requests.execution import Executor
from servers.scheduling.compute_thread import ComputeThread
from servers.scheduling.turns import Turns
from servers.stores.stores import Stores
from tests.raising import raises
from tests.servers.peers import HIDDEN, LIMITS, SPAN, forward, lora, put, stores

HONEST, MALLORY = "honest", "mallory"
Parts = tuple[Engine, ComputeThread]


def executor_of(engine: Parts, kept: Stores | None = None, **changes: int) -> Executor:
    admission = Admission(dataclasses.replace(LIMITS, max_positions=4096, max_tokens=16384, **changes))
    for client in (HONEST, MALLORY):
        admission.open_stream(client)
    return Executor(*engine, kept or stores(leases=2**26), admission, Turns())


def noise(rows: int = 2, positions: int = 8) -> torch.Tensor:
    return torch.randn(rows, positions, HIDDEN, generator=torch.Generator().manual_seed(5))


async def trained(executor: Executor) -> list[torch.Tensor]:
    """The output and the gradient of an honest step of training."""
    reply = await executor.run(HONEST, Forward(span=SPAN, hidden=noise(), keep=True))
    assert isinstance(reply, Forwarded)
    assert reply.lease is not None
    gradients: Any = await executor.run(HONEST, Backward(lease=reply.lease, grad=noise()))
    return [reply.hidden, gradients.hidden]


@pytest.fixture
def computed(engine: Parts, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests that were computed, and those steps."""
    seen: list[Any] = []
    for name in ("forward", "backward", "step", "prepare_adapter"):
        run = getattr(engine[0], name)
        monkeypatch.setattr(
            engine[0], name, lambda first, *others, run=run, **how: (seen.append(first), run(first, *others, **how))[1]
        )
    return seen


async def refused(executor: Executor, request: Any) -> RequestRefused:
    with pytest.raises(RequestRefused) as caught:
        await executor.run(MALLORY, request)
    return caught.value


async def fitting(executor: Executor, request: Any) -> int:
    """How many tokens would fit, where `request` is refused because it is larger."""
    error = await refused(executor, request)
    assert error.limit == "max_compute_gb"
    assert error.fits is not None
    return error.fits


async def test_many_parts_on_one_linear_are_refused_by_their_number(engine, computed):
    executor = executor_of(engine)
    alone = await trained(executor)
    computed.clear()
    with raises(RequestRefused, reason="adapter", block=1, module="mlp.gate_proj"):
        await executor.run(MALLORY, put(*[lora(1, dropout=0.1)] * 10_000))
    assert not computed, "nothing was prepared"
    assert executor._stores.adapters.used_bytes == 0
    assert isinstance(await executor.run(MALLORY, put(*[lora(1)] * MAX_PARTS_A_MODULE)), Done)
    assert all(map(torch.equal, alone, await trained(executor)))


async def test_parts_that_are_allowed_count_before_they_are_computed(engine, computed):
    """Eight parts with dropout on a linear keep eight times its input."""
    plain = engine[0].footprint.training_bytes(Pass(span=SPAN, train=True, padded=False, per_block=True), 1, 512)
    executor = executor_of(engine, max_compute_bytes=plain)
    alone = await trained(executor)
    await executor.run(MALLORY, put(*[lora(1, dropout=0.1)] * MAX_PARTS_A_MODULE))
    attack = {"hidden": noise(1, 512), "train": True, "adapter": "v", "keep": True}
    computed.clear()
    fits = await fitting(executor, forward(**attack))
    assert fits < 512
    assert not computed
    shorter = {**attack, "hidden": noise(1, fits)}
    assert isinstance(await executor.run(MALLORY, forward(**shorter)), Forwarded)
    del attack["adapter"]
    assert isinstance(await executor.run(MALLORY, forward(**attack)), Forwarded), "without its adapter it fits"
    assert all(map(torch.equal, alone, await trained(executor)))


@pytest.mark.parametrize(("keep", "limit_bytes"), [(False, 2**23), (True, 2**24)])
async def test_attention_beyond_the_memory_is_refused_with_the_rows_that_fit(engine, computed, keep, limit_bytes):
    padding = torch.ones(4, 1024, dtype=torch.bool)
    padding[:, 0] = False  # a mask of 1024 x 1024 for each row
    executor = executor_of(engine, max_compute_bytes=limit_bytes)

    def attack(rows: int) -> Forward:
        return forward(hidden=noise(rows, 1024), padding=padding[:rows], keep=keep)

    alone = await trained(executor)
    computed.clear()
    rows, rest = divmod(await fitting(executor, attack(4)), 1024)
    assert (1 <= rows < 4, rest) == (True, 0)
    assert not computed
    assert await fitting(executor, attack(rows + 1)) == rows * 1024
    assert isinstance(await executor.run(MALLORY, attack(rows)), Forwarded)
    assert await fitting(executor, Backward(again=attack(4), grad=noise(4, 1024))) <= rows * 1024
    assert len(computed) == 1, "the one that fits"
    assert all(map(torch.equal, alone, await trained(executor)))


async def test_a_step_beyond_the_memory_is_refused_with_the_positions_that_fit(engine, computed):
    executor = executor_of(engine, kept=stores(sessions=2**26), max_compute_bytes=2**23)
    opened: Any = await executor.run(MALLORY, OpenSession(span=SPAN, rows=2, max_length=2048))
    fits = await fitting(executor, Step(session=opened.session, hidden=noise(2, 2048), position=0))
    assert not computed
    await executor.run(MALLORY, Step(session=opened.session, hidden=noise(2, fits // 4), position=0))


async def test_kept_graphs_never_pass_their_budget_however_many_are_computed_at_once(engine, monkeypatch):
    """Room is reserved before: counted afterwards, all of them would be there at once."""
    footprint = engine[0].footprint
    one = footprint.kept_bytes(Pass(span=SPAN, padded=False), 1, 64)
    kept = stores(leases=3 * one + 100)
    executor, used = executor_of(engine, kept), []
    run = engine[0].forward

    def spied(*args: Any, **how: Any) -> Any:
        used.append(kept.leases.used_bytes)
        return run(*args, **how)

    monkeypatch.setattr(engine[0], "forward", spied)
    replies = await asyncio.gather(*(executor.run(MALLORY, forward(hidden=noise(1, 64), keep=True)) for _ in range(6)))
    leases = [reply.lease for reply in replies if isinstance(reply, Forwarded) and reply.lease is not None]
    assert (len(replies), len(leases), len(used)) == (6, 3, 6), "all are answered"
    assert 2 * one < used[0] <= max(used) <= kept.leases.max_bytes
    assert 0.5 * one < kept.leases.used_bytes / 3 < one, "by now, what was measured"


@pytest.fixture
def held(engine: Parts) -> Iterator[threading.Event]:
    """Until this is set, the compute thread is busy."""
    release = threading.Event()
    yield release
    release.set()


async def test_a_graph_whose_backward_waits_is_still_counted(engine, held):
    executor = executor_of(engine)
    leases = executor._stores.leases
    lease = (await executor.run(MALLORY, forward(keep=True))).lease
    counted = leases.used_bytes
    busy = asyncio.create_task(engine[1].run(0, held.wait))
    backward = asyncio.create_task(executor.run(MALLORY, Backward(lease=lease, grad=torch.ones(1, 2, HIDDEN))))
    for _ in range(3):
        await asyncio.sleep(0)
    assert leases.used_bytes == counted > 0
    held.set()
    await asyncio.gather(busy, backward)
    assert leases.used_bytes == 0


async def test_an_adapter_that_never_fits_is_refused_before_it_is_moved_to_the_device(engine, computed):
    executor = executor_of(engine, kept=stores(adapters=1000))
    assert (await refused(executor, put(lora(16)))).limit == "max_adapter_gb"
    assert not computed


async def test_an_adapter_that_does_not_fit_the_blocks_leaves_no_room_reserved(engine):
    executor = executor_of(engine)
    await refused(executor, put(lora(scaling=float("nan"))))
    assert executor._stores.adapters.used_bytes == 0


async def test_a_term_of_a_sum_without_room_is_refused_before_its_backward(engine, computed):
    executor = executor_of(engine, kept=stores(sums=lora().tensors[0].nbytes))
    await executor.run(MALLORY, put(lora()))
    computed.clear()
    backward = Backward(again=forward(adapter="v"), grad=torch.ones(1, 2, HIDDEN), adapter_sum=1)
    with raises(ServerBusy, limit="max_adapter_gb"):
        await executor.run(MALLORY, backward)
    assert not computed
    assert executor._stores.sums.used_bytes == 0


async def test_a_sum_is_counted_until_it_is_summed(engine, held):
    executor = executor_of(engine)
    sums = executor._stores.sums
    await executor.run(MALLORY, put(lora()))
    await executor.run(MALLORY, Backward(again=forward(adapter="v"), grad=torch.ones(1, 2, HIDDEN), adapter_sum=1))
    counted = sums.used_bytes
    assert counted == sum(tensor.nbytes for tensor in lora().tensors)
    busy = asyncio.create_task(engine[1].run(0, held.wait))
    collect = asyncio.create_task(executor.run(MALLORY, CollectSum(adapter_sum=1)))
    for _ in range(3):
        await asyncio.sleep(0)
    assert sums.used_bytes == counted
    held.set()
    await asyncio.gather(busy, collect)
    assert sums.used_bytes == 0
