"""A GPU that has no memory left, or fails: requests of every kind, on blocks of two pretended cards."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from petals_tune.blocks.engine import Engine
from petals_tune.errors import DeviceFailed, ServerBusy, ServerError
from petals_tune.wire.messages import (
    Backward,
    Forwarded,
    Gradients,
    Message,
    OpenSession,
    Refusal,
    SessionOpened,
    Step,
    Stepped,
)
from servers.scheduling.compute_thread import ComputeThread
from tests.pretend_device import GpuEngine, failed_gpu
from tests.servers.parts import load
from tests.servers.peers import HIDDEN, SPAN, House, forward, is_refusal_of
from tests.servers.steps import hidden, outputs, session, step

FULL = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of 79.11 GiB of which 812.00 MiB is "
    "free. Including non-PyTorch memory, this process has 78.30 GiB memory in use."
)
LAUNCH = torch.AcceleratorError("CUDA error: invalid configuration argument")  # of one call: the card goes on


@pytest.fixture(scope="module")
def engine(model_folder) -> Iterator[tuple[Engine, ComputeThread]]:
    compute = ComputeThread(1)
    try:
        yield GpuEngine(load(model_folder("llama"), str(SPAN)), ["cuda:0", "cuda:0", "cuda:1"]), compute
    finally:
        compute.stop()


@contextmanager
def failing(engine: tuple[Engine, ComputeThread], error: Exception) -> Iterator[list[int]]:
    """The last block, on the second card, raises `error`; gives the numbers of rows that it was called with."""
    rows: list[int] = []

    def fail(_: object, args: tuple[torch.Tensor, ...]) -> None:
        rows.append(len(args[0]))
        raise error

    hook = engine[0].block(SPAN.stop - 1).register_forward_pre_hook(fail)
    try:
        yield rows
    finally:
        hook.remove()


def backward() -> Backward:
    return Backward(again=forward(), grad=torch.ones(1, 2, HIDDEN))


@pytest.mark.parametrize(
    ("request_", "answer"), [(forward(), Forwarded), (forward(keep=True), Forwarded), (backward(), Gradients)]
)
async def test_a_request_without_memory_is_told_how_much_was_missing_and_the_next_one_is_served(
    engine, request_: Message, answer
):
    async with House(engine).client() as client:
        with failing(engine, FULL):
            refusal = await client.ask(request_)
        assert is_refusal_of(ServerBusy("", limit="memory"), refusal)
        assert "2.50 GiB" in refusal.text
        assert "812.00 MiB" in refusal.text
        assert isinstance(await client.ask(request_), answer)


async def test_a_step_without_memory_is_refused_and_can_be_sent_again(engine):
    async with House(engine).client() as client:
        opened = await client.ask(OpenSession(span=SPAN, rows=1, max_length=8))
        assert isinstance(opened, SessionOpened)

        def step(position: int, length: int) -> Step:
            return Step(session=opened.session, hidden=torch.ones(1, length, HIDDEN), position=position)

        assert isinstance(await client.ask(step(0, 3)), Stepped)
        with failing(engine, FULL):
            assert is_refusal_of(ServerBusy("", limit="memory"), await client.ask(step(3, 1)))
        assert isinstance(await client.ask(step(3, 1)), Stepped)


def test_steps_in_a_batch_without_memory_are_run_alone(engine):
    sessions = [session(1), session(1)]
    for each in sessions:
        outputs(engine[0], (each, step(hidden(1, 3, seed=1), 0)))
    batch = [(each, step(hidden(1, 1, seed=2), 3)) for each in sessions]
    with failing(engine, FULL) as rows:
        assert engine[0].step(batch) == [FULL, FULL]
    assert rows == [2, 1, 1]
    assert [each.position for each in sessions] == [3, 3]
    assert len(outputs(engine[0], *batch)) == 2


async def test_an_error_of_one_call_leaves_the_server_as_it_is(engine):
    house = House(engine)
    async with house.client() as client:
        with failing(engine, LAUNCH):
            assert is_refusal_of(ServerError(""), await client.ask(forward()))
        assert isinstance(await client.ask(forward()), Forwarded)
        assert not house.handler.failed.is_set()


async def test_a_card_that_fails_ends_the_serving(engine):
    """Every later call fails, too; so the server says why, and takes no more requests."""
    house = House(engine)
    async with house.client() as client:
        with failed_gpu("cuda:1"):
            refusal = await client.ask(forward())
            assert isinstance(refusal, Refusal)
            assert is_refusal_of(ServerError(""), refusal)
            async with asyncio.timeout(5):
                await house.handler.failed.wait()
            assert isinstance(house.handler.failure, DeviceFailed)
            assert house.handler.failure.device == "cuda:1"
            assert is_refusal_of(ServerBusy("", leaving=True), await client.ask(forward()))
