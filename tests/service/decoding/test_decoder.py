"""Answers of a model that counts, whose every step the test can see and hold."""

import asyncio
import threading
from contextlib import aclosing

import pytest
import torch

from petals_tune.errors import ServerTimeout
from petals_tune.service.decoding.decoder import Decoder
from petals_tune.service.decoding.options import DecodingOptions
from petals_tune.service.errors import ServiceError, stopping
from petals_tune.service.metrics import Asker, Metrics
from petals_tune.service.users.fairness import Fairness
from petals_tune.service.users.slots import Slots
from tests.train.tiny import tiny_tokenizer

VOCABULARY = 300
ASKER = Asker(owner="anna", interface="openai", model="counts")
BEN = Asker(owner="ben", interface="openai", model="counts")


class Counting:
    """The token behind n is n + 1. `gate` is waited for at each step but the first of a prompt."""

    def __init__(self):
        self.open_texts, self.read, self.forks, self.steps = 0, [], 0, 0
        self.gate, self.error, self.adapters = threading.Event(), None, []
        self.gate.set()
        self.lock = threading.Lock()

    def open(self, adapter, max_length, cancelled):
        self.adapters.append(adapter)
        return Text(self, cancelled, max_length)


class Text:
    def __init__(self, model, cancelled, room):
        self.model, self.cancelled, self.room = model, cancelled, room
        with model.lock:
            model.open_texts += 1

    def logits(self, ids):
        if self.model.error is not None:
            raise self.model.error
        with self.model.lock:
            if len(ids) > 1:
                self.model.read.append(list(ids))
            else:
                self.model.steps += 1
        if len(ids) == 1:
            while not self.model.gate.wait(0.01):
                if self.cancelled.is_set():
                    break
        self.room -= len(ids)
        assert self.room >= 0
        return torch.nn.functional.one_hot(torch.tensor(ids[-1] + 1), VOCABULARY).float() * 50

    def fork(self):
        self.model.forks += 1
        return Text(self.model, self.cancelled, self.room)

    def close(self):
        with self.model.lock:
            self.model.open_texts -= 1


@pytest.fixture
def model():
    return Counting()


@pytest.fixture
def fairness():
    return Fairness(slots=Slots(2), most_in_flight=9, most_waiting=9)


@pytest.fixture
def decoder(model, fairness):
    decoder = Decoder(
        model, tiny_tokenizer(), fairness, Metrics(fairness.slots), vocabulary=VOCABULARY, ends=frozenset({20})
    )
    yield decoder
    decoder.close()
    assert model.open_texts == 0


def options(count=1, **fields):
    return [DecodingOptions(**{"max_tokens": 4, "temperature": 0, **fields})] * count


async def tokens_of(pieces, count=1):
    found = [[] for _ in range(count)]
    async with aclosing(pieces):
        async for piece in pieces:
            found[piece.number].append(piece.choice.token)
            ended = piece.finish
    return found, ended


async def test_an_answer_goes_on_token_by_token(decoder, model):
    found, ended = await tokens_of(decoder.answers([3, 4], options(), adapter="x", asker=ASKER))
    assert (found, ended) == ([[5, 6, 7, 8]], "length")
    assert (model.read, model.adapters, model.forks) == ([[3, 4]], ["x"], 0)


async def test_a_token_that_ends_ends_it(decoder):
    found, ended = await tokens_of(decoder.answers([1, 17], options(max_tokens=9), adapter=None, asker=ASKER))
    assert (found, ended) == ([[18, 19, 20]], "stop")


async def test_a_prompt_is_computed_once_for_all_its_answers(decoder, model):
    found, _ = await tokens_of(decoder.answers([3, 4], options(5), adapter=None, asker=ASKER), 5)
    assert found == [[5, 6, 7, 8]] * 5
    assert model.read == [[3, 4]]
    assert model.forks == 4, "the last one goes on in the session that read the prompt"


async def test_who_leaves_frees_all_sessions_after_the_steps_that_run(decoder, model):
    model.gate.clear()
    pieces = decoder.answers([3, 4], options(3, max_tokens=200), adapter=None, asker=ASKER)
    await anext(pieces)
    while model.steps < 2:
        await asyncio.sleep(0.01)
    assert model.open_texts == 3, "two that are written, and the one that the third answer will begin with"
    await pieces.aclose()
    assert model.open_texts == 0
    assert model.steps == 2


async def test_what_the_model_raises_is_raised(decoder, model, fairness):
    model.error = ServerTimeout("late")
    with pytest.raises(ServerTimeout):
        await anext(decoder.answers([3, 4], options(3), adapter=None, asker=ASKER))
    assert fairness.slots.waiting() == 0


async def test_an_answer_gives_its_slot_to_another_key_and_goes_on_later(decoder, model):
    model.gate.clear()
    long = decoder.answers([1, 2], options(2, max_tokens=10), adapter=None, asker=ASKER)
    await anext(long)
    while model.steps < 2:
        await asyncio.sleep(0.01)
    short = asyncio.create_task(tokens_of(decoder.answers([6, 7], options(), adapter=None, asker=BEN)))
    await asyncio.sleep(0.05)
    assert model.read == [[1, 2]], "all slots are taken"
    model.gate.set()
    assert (await short)[0] == [[8, 9, 10, 11]]
    found, _ = await tokens_of(long, 2)
    assert sorted(found) == [[*range(3, 13)], [*range(4, 13)]], "one token of the first was read before"


async def test_all_answers_can_be_told_to_end(decoder, model):
    model.gate.clear()
    running = decoder.answers([3, 4], options(2), adapter=None, asker=ASKER)
    waiting = decoder.answers([3, 4], options(), adapter=None, asker=ASKER)
    await anext(running)
    queued = asyncio.create_task(anext(waiting))
    await asyncio.sleep(0.05)
    decoder.end(stopping())
    for pieces in (running, waiting):
        with pytest.raises(ServiceError):
            await (queued if pieces is waiting else tokens_of(pieces, 2))


async def test_tokens_are_charged_also_of_an_answer_that_was_left(decoder, fairness):
    fairness.tokens_a_minute = 1000
    pieces = decoder.answers([3, 4], options(), adapter=None, asker=ASKER)
    await anext(pieces)
    await pieces.aclose()
    assert fairness._buckets["anna"].left == pytest.approx(1000 - 3, abs=0.5)
