"""Tensors that other servers hand on: each is given back once, whatever happens to it, and none is kept for ever."""

import asyncio
from collections import Counter

import pytest
import torch

from petals_tune.errors import NotHandedOn, RequestRefused
from petals_tune.wire.messages import Delivery, HandOver
from servers.requests import hand_over as handover
from servers.requests.hand_over import Expected


class Desk:
    """Deliveries to `expected`, and how often the memory of each was given back."""

    def __init__(self) -> None:
        self.expected, self.given_back = Expected(), Counter[int]()

    def deliver(self, number: int) -> None:
        delivery = Delivery(ticket=ticket(number), tensor=torch.full((1, 1, 1), float(number)))
        self.expected.deliver(delivery, lambda: self.given_back.update([number]))

    def take(self, number: int, giver: str = "a") -> asyncio.Task[handover.Delivered]:
        return asyncio.create_task(self.expected.take(HandOver(peer=giver, ticket=ticket(number))))


def ticket(number: int) -> bytes:
    return number.to_bytes(16, "big")


async def test_before_or_after_its_request_a_tensor_reaches_it():
    desk = Desk()
    first = desk.take(1)
    await asyncio.sleep(0)
    for number in (1, 2):
        desk.deliver(number)
    for number, task in ((1, first), (2, desk.take(2))):
        assert (await task).tensor.item() == number
    assert not desk.given_back, "that is for the request to do, once it is computed"


async def test_a_ticket_is_good_once():
    desk = Desk()
    desk.deliver(1)
    await desk.take(1)
    with pytest.raises(NotHandedOn, match="used before"):
        await desk.take(1)
    desk.deliver(1)
    assert desk.given_back == {1: 1}, "the second delivery"
    waiting = desk.take(2)
    await asyncio.sleep(0)
    with pytest.raises(RequestRefused, match="second request"):
        await desk.take(2)
    waiting.cancel()


async def test_who_left_gives_nothing_more_and_others_do():
    desk = Desk()
    from_a, from_b = desk.take(1, "a"), desk.take(2, "b")
    await asyncio.sleep(0)
    desk.expected.gone("a", "it left")
    with pytest.raises(NotHandedOn, match="server a did not hand its output on: it left"):
        await from_a
    desk.deliver(2)
    assert (await from_b).tensor.item() == 2


async def test_what_is_withdrawn_is_given_back_whenever_it_comes():
    desk = Desk()
    waiting = desk.take(1)
    desk.deliver(2)
    await asyncio.sleep(0)
    desk.expected.withdraw([ticket(1), ticket(2), ticket(3)])
    with pytest.raises(NotHandedOn, match="withdrew"):
        await waiting
    for number in (1, 3):
        desk.deliver(number)
    assert desk.given_back == {1: 1, 2: 1, 3: 1}


async def test_a_request_that_is_cancelled_while_its_tensor_comes_gives_it_back():
    desk = Desk()
    waiting = desk.take(1)
    await asyncio.sleep(0)
    desk.deliver(1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert desk.given_back == {1: 1}


async def test_tensors_without_a_request_are_few_and_do_not_stay(monkeypatch):
    monkeypatch.setattr(handover, "MAX_EARLY", 3)
    desk = Desk()
    for number in range(5):
        desk.deliver(number)
    assert desk.given_back == {0: 1, 1: 1}
    with pytest.raises(NotHandedOn, match="could not be kept"):
        await desk.take(0)
    assert (await desk.take(4)).tensor.item() == 4
    monkeypatch.setattr(handover, "EARLY_S", 0.0)
    desk.deliver(5)
    assert desk.given_back.keys() >= {2, 3}
