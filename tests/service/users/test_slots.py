"""Which key gets a slot, and which has to give one back."""

import asyncio
from contextlib import asynccontextmanager

from petals_tune.service.users.slots import Slots


class Work:
    """Holds slots until it is told to end, or until they are due."""

    def __init__(self, most):
        self.slots, self.begun, self._tasks = Slots(most), [], []

    async def begin(self, owner, count=1, *, yields=True):
        for number in range(count):
            self._tasks.append(asyncio.create_task(self._hold(owner, f"{owner}{number}", yields)))
        await settle()

    async def _hold(self, owner, name, yields):
        while True:
            async with self.slots.held(owner) as slot:
                self.begun.append(name)
                while not (yields and slot.is_due):
                    await asyncio.sleep(0)

    async def end(self, number):
        self._tasks[number].cancel()
        await settle()

    def held(self, owner):
        return sum(slot.owner == owner for slot in self.slots._held)


@asynccontextmanager
async def work_on(most):
    work = Work(most)
    try:
        yield work
    finally:
        for task in work._tasks:
            task.cancel()
        await asyncio.gather(*work._tasks, return_exceptions=True)
        assert not work.slots._held
        assert not work.slots.waiting()


async def settle():
    for _ in range(50):
        await asyncio.sleep(0)


async def test_one_key_may_have_all_slots_and_others_get_their_share_when_they_come():
    async with work_on(4) as work:
        await work.begin("anna", 6)
        assert work.held("anna") == 4
        assert work.slots.waiting() == 2
        await work.begin("ben")
        assert (work.held("anna"), work.held("ben")) == (3, 1)
        await work.begin("ben", 5)
        assert (work.held("anna"), work.held("ben")) == (2, 2)
        await work.begin("carl")
        assert work.held("carl") == 1
        assert {work.held("anna"), work.held("ben")} == {1, 2}
        assert work.slots.waiting("carl") == 0


async def test_a_slot_that_comes_free_goes_to_the_key_that_has_fewest():
    async with work_on(2) as work:
        await work.begin("anna", 5, yields=False)
        await work.begin("ben", 1, yields=False)
        assert work.held("ben") == 0, "nobody gave a slot back"
        await work.end(0)
        assert (work.held("anna"), work.held("ben")) == (1, 1)


async def test_keys_that_have_equally_many_take_turns():
    async with work_on(1) as work:
        await work.begin("anna", 3, yields=False)
        await work.begin("ben", 3, yields=False)
        for _ in range(5):
            await work.end(["anna0", "anna1", "anna2", "ben0", "ben1", "ben2"].index(work.begun[-1]))
        assert [name.rstrip("012") for name in work.begun] == ["anna", "ben"] * 3


async def test_slots_are_not_taken_from_one_another_for_nothing():
    """Where one key has just one more than another one, nothing changes hands."""
    async with work_on(3) as work:
        await work.begin("anna", 2)
        await work.begin("ben", 3)
        before = list(work.begun)
        await settle()
        assert work.begun == before
        assert (work.held("anna"), work.held("ben")) == (2, 1)


async def test_who_is_cancelled_while_it_waits_takes_no_slot():
    async with work_on(1) as work:
        await work.begin("anna", 3, yields=False)
        await work.end(1)
        assert work.slots.waiting() == 1
        await work.end(0)
        assert work.begun == ["anna0", "anna2"]


async def test_who_is_cancelled_as_it_is_granted_a_slot_gives_it_back():
    slots = Slots(1)
    async with slots.held("anna"):
        waiting = asyncio.create_task(slots.held("ben").__aenter__())
        await asyncio.sleep(0)
    waiting.cancel()  # the slot is granted, and the task has not run since
    await asyncio.gather(waiting, return_exceptions=True)
    async with slots.held("carl"):
        pass
