import asyncio
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import CancelledError

import pytest

from petals_tune.swarm import loop


def test_work_runs_on_one_background_loop_and_its_result_comes_back():
    async def where() -> tuple[int, asyncio.AbstractEventLoop]:
        return threading.get_ident(), asyncio.get_running_loop()

    thread, first = loop.run(where())
    assert thread != threading.get_ident()
    assert loop.run(where()) == (thread, first)


@pytest.mark.parametrize("error", [LookupError("no"), TimeoutError("the work's own")])
def test_an_error_comes_back_as_itself(error):
    async def fails() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        loop.run(fails())
    assert caught.value.args == error.args  # a TimeoutError is made anew on the way


def test_threads_share_the_loop():
    barrier, results = threading.Barrier(8), []

    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return 2 * number

    def work(number: int) -> None:
        barrier.wait()
        results.append(loop.run(double(number)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 2, 4, 6, 8, 10, 12, 14]


def test_ctrl_c_cancels_what_runs():
    started, cancelled = threading.Event(), threading.Event()

    async def forever() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def press() -> None:
        started.wait()
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        loop.run(forever())
    presser.join()
    assert cancelled.wait(timeout=30)


def test_a_task_is_started_on_the_loop():
    called = threading.Event()
    loop.background_loop()

    async def work() -> None:
        called.set()

    loop.start_task(work)
    assert called.wait(timeout=30)


def test_a_thread_gives_up_what_it_waits_for_when_it_is_told():
    told, started, cancelled = threading.Event(), threading.Event(), threading.Event()

    async def forever() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def wait() -> None:
        with pytest.raises(CancelledError), loop.giving_up_on(told):
            loop.run(forever())

    thread = threading.Thread(target=wait)
    thread.start()
    assert started.wait(30)
    told.set()
    thread.join()
    assert cancelled.wait(30)


def outcome(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)


IMPORTS = """
import asyncio, os
from petals_tune.swarm import loop
async def three(): return 3
async def end(): os._exit(1)
"""


def test_a_forked_child_gets_a_loop_of_its_own():
    script = """
assert loop.run(three()) == 3
before = loop.background_loop()
child = os.fork()
if child == 0:
    loop.start_task(end)  # the parent's loop: nothing may come of it
    os._exit(0 if loop.run(three()) == 3 and loop.background_loop() is not before else 2)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert loop.run(three()) == 3
print("both")
"""
    done = outcome(IMPORTS + script)
    assert (done.returncode, done.stdout) == (0, "both\n"), done.stderr


def test_a_finalizer_may_use_the_loop_at_interpreter_exit():
    script = """
class Kept:
    def __del__(self):
        loop.start_task(three)
kept = Kept()
loop.run(three())
kept.itself = kept
"""
    done = outcome(IMPORTS + script)
    assert (done.returncode, done.stderr) == (0, "")
