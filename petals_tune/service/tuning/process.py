"""A job's process, in a process group of its own, and the files that it writes beside its run."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

OUTPUT, ERRORS, LOCK = "output.txt", "errors.txt", "lock"
LAST_LINES, LAST_CHARACTERS = 12, 2000


class JobProcess:
    """A process that ends when this one does: its standard input closes then, which it watches (exit_with_stdin).

    It holds a lock on its folder, so that a service which was started again does not run the job twice.
    """

    def __init__(self, command: Sequence[str], folder: Path, lock: IO[bytes]):
        """lock: of `take_lock`, which is handed over."""
        self.folder = folder
        with lock, (folder / OUTPUT).open("ab") as output, (folder / ERRORS).open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=errors,
                pass_fds=(lock.fileno(),),
                start_new_session=True,  # Ctrl-C in the terminal reaches the service, which then ends its jobs itself
            )
        self._killed_s: float | None = None

    @property
    def ended(self) -> bool:
        """Whether it has ended. It stays to be waited for, so that its id remains that of its group."""
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def end(self, *, now_s: float, grace_s: float) -> None:
        """Ask it to end; asked again after `grace_s`, end its whole group. To be called until it has `ended`."""
        if self._killed_s is None:
            self._killed_s = now_s + grace_s
            self._process.send_signal(signal.SIGTERM)  # as Ctrl-C: it saves a checkpoint
        elif now_s >= self._killed_s:
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> int:
        """Return the exit status of a process that has ended; whatever is left of its group is ended too."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        return status

    def last_lines(self) -> str:
        """The end of what it wrote to standard error."""
        text = (self.folder / ERRORS).read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.strip().splitlines()[-LAST_LINES:])[-LAST_CHARACTERS:]


def take_lock(folder: Path) -> IO[bytes] | None:
    """Lock the folder of a job; None while a process of it is still there, which a service before this one started."""
    lock = (folder / LOCK).open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock
