"""Which processes there are, from /proc: tests of what is left behind need to know exactly."""

import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MARK = "PETALS_TUNE_TEST_RUN"  # in the environment of all processes that a run of the tests starts
LONG_S = 60.0  # for what takes a moment, on a machine that is busy


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process. `started` tells it from a later one with the same id."""

    id: int
    parent: int
    started: int
    command: str

    @property
    def alive(self) -> bool:
        return any(each.id == self.id and each.started == self.started for each in processes())

    @property
    def is_server(self) -> bool:
        return "-m servers" in self.command

    @property
    def is_daemon(self) -> bool:
        return "p2pd" in self.command


def processes() -> Iterator[Process]:
    """All that run now; one that has ended and was not waited for is gone."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if fields[0] != "Z":
            yield Process(id=int(folder.name), parent=int(fields[1]), started=int(fields[19]), command=command)


def descendants(process: int) -> list[Process]:
    """The children of a process, theirs, and so on."""
    everybody = list(processes())
    found, parents = [], {process}
    while children := [each for each in everybody if each.parent in parents and each not in found]:
        found += children
        parents = {each.id for each in children}
    return found


def mark_this_run() -> None:
    """Let all processes that are started from here on carry the mark of this run."""
    os.environ[MARK] = secrets.token_hex(8)


def servers_of_this_run() -> list[Process]:
    """Servers and p2p daemons that this run started, however indirectly, and whoever their parent is now."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = []
    for process in processes():
        try:
            environment = Path(f"/proc/{process.id}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if mark in environment and (process.is_server or process.is_daemon):
            found.append(process)
    return found


def wait_until(holds: Callable[[], bool], what: str, *, long_s: float = LONG_S) -> None:
    """Fails after a long while, naming `what` did not come."""
    deadline_s = time.monotonic() + long_s
    while not holds():
        assert time.monotonic() < deadline_s, f"waited {long_s:g} s in vain: {what}"
        time.sleep(0.05)
