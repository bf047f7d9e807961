"""For all tests: one thread, no hub, no timed assertions, and no process left behind."""

import os
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, and inherited by the servers that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

MARK = ("PETALS_TUNE_TEST_RUN", secrets.token_hex(8))  # all processes that this run starts inherit it
os.environ[MARK[0]] = MARK[1]

settings.register_profile("petals_tune", deadline=None, derandomize=True)
settings.load_profile("petals_tune")


def servers_of_this_run() -> dict[int, str]:
    """Processes that are servers or p2p daemons and were started by this run, however indirectly: id -> command line."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        if "=".join(MARK).encode() in environment and ("p2pd" in command or "-m servers" in command):
            found[int(folder.name)] = command
    return found


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fails the run where servers or p2p daemons that it started are still there at its end; ends them."""
    yield
    deadline_s = time.monotonic() + 15
    while (left := servers_of_this_run()) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left, f"this run leaves processes behind: {left}"
