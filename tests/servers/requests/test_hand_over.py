"""Tensors that other servers hand on: the memory of each is released once, and none stays for ever."""

import asyncio
from collections import Counter

import pytest
import torch

from petals_tune.errors import NotHandedOn, RequestRefused
from petals_tune.wire.messages import Delivery, HandOver
from servers.requests import hand_over
from servers.requests.hand_over import Inbox
from tests.raising import raises


class Deliveries:
    """Deliveries to an inbox, and how often the memory of each was released."""

    def __init__(self) -> None:
        self.inbox, self.released = Inbox(), Counter[int]()

    def deliver(self, number: int, stream: str = "stream") -> None:
        delivery = Delivery(ticket=ticket(number), tensor=torch.full((1, 1, 1), float(number)))
        self.inbox.deliver(delivery, stream, lambda: self.released.update([number]))

    def receive(self, number: int, giver: str = "a") -> asyncio.Task[hand_over.Delivered]:
        return asyncio.create_task(self.inbox.receive(HandOver(peer=giver, ticket=ticket(number))))


def ticket(number: int) -> bytes:
    return number.to_bytes(16, "big")


async def test_before_or_after_its_request_a_tensor_reaches_it():
    deliveries = Deliveries()
    first = deliveries.receive(1)
    await asyncio.sleep(0)
    for number in (1, 2):
        deliveries.deliver(number)
    for number, task in ((1, first), (2, deliveries.receive(2))):
        assert (await task).tensor.item() == number
    assert not deliveries.released, "that is for the request to do, once it is computed"


async def test_a_ticket_is_good_once():
    deliveries = Deliveries()
    deliveries.deliver(1)
    await deliveries.receive(1)
    with raises(NotHandedOn, peer="a", reason="used or dropped"):
        await deliveries.receive(1)
    deliveries.deliver(1)
    assert deliveries.released == {1: 1}, "the second delivery"
    waiting = deliveries.receive(2)
    await asyncio.sleep(0)
    with raises(RequestRefused, reason="ticket"):
        await deliveries.receive(2)
    waiting.cancel()


async def test_who_left_gives_nothing_more_and_others_do():
    deliveries = Deliveries()
    from_a, from_b = deliveries.receive(1, "a"), deliveries.receive(2, "b")
    await asyncio.sleep(0)
    deliveries.inbox.fail_from("a", "it left")
    with raises(NotHandedOn, peer="a", reason="peer lost"):
        await from_a
    deliveries.deliver(2)
    assert (await from_b).tensor.item() == 2


async def test_what_is_withdrawn_is_given_back_whenever_it_comes():
    deliveries = Deliveries()
    waiting = deliveries.receive(1)
    deliveries.deliver(2)
    await asyncio.sleep(0)
    deliveries.inbox.withdraw([ticket(1), ticket(2), ticket(3)])
    with raises(NotHandedOn, reason="withdrawn"):
        await waiting
    for number in (1, 3):
        deliveries.deliver(number)
    assert deliveries.released == {1: 1, 2: 1, 3: 1}


async def test_a_request_that_is_cancelled_while_its_tensor_comes_gives_it_back():
    deliveries = Deliveries()
    waiting = deliveries.receive(1)
    await asyncio.sleep(0)
    deliveries.deliver(1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert deliveries.released == {1: 1}


async def test_tensors_without_a_request_are_few_and_do_not_stay(monkeypatch):
    monkeypatch.setattr(hand_over, "MAX_EARLY", 3)
    deliveries = Deliveries()
    for number in range(5):
        deliveries.deliver(number)
    assert deliveries.released == {0: 1, 1: 1}
    with raises(NotHandedOn, peer="a", reason="used or dropped"):
        await deliveries.receive(0)
    assert (await deliveries.receive(4)).tensor.item() == 4


async def test_a_tensor_without_a_request_goes_after_a_while_though_no_other_one_comes(monkeypatch):
    monkeypatch.setattr(hand_over, "EARLY_S", 0.02)
    deliveries = Deliveries()
    for number in range(3):
        deliveries.deliver(number)
    assert (await deliveries.receive(1)).tensor.item() == 1
    await asyncio.sleep(0.1)
    assert deliveries.released == {0: 1, 2: 1}, "the one that was received is its request's to release"
    assert not deliveries.inbox._early


async def test_a_tensor_without_a_request_goes_with_the_stream_that_brought_it():
    deliveries = Deliveries()
    for number, stream in enumerate(("left", "right", "left")):
        deliveries.deliver(number, stream)
    deliveries.inbox.drop_from("left")
    assert deliveries.released == {0: 1, 2: 1}
    with raises(NotHandedOn, peer="a", reason="used or dropped"):
        await deliveries.receive(0)
    assert (await deliveries.receive(1)).tensor.item() == 1
