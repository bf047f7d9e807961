"""What becomes of work that goes on in the background."""

import asyncio

from petals_tune.net.background import begin


async def wait_for(released: asyncio.Event) -> None:
    await released.wait()
    raise KeyError("a bug")


async def test_the_log_says_at_once_that_work_has_ended(caplog):
    released = asyncio.Event()
    task = begin(wait_for(released), "the renewal")
    await asyncio.sleep(0)
    assert not caplog.records
    released.set()
    await asyncio.wait({task})
    await asyncio.sleep(0)
    (record,) = caplog.records
    assert "the renewal has ended" in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)


async def test_work_that_is_cancelled_ends_without_a_word(caplog):
    task = begin(wait_for(asyncio.Event()), "the renewal")
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    await asyncio.sleep(0)
    assert not caplog.records
