"""How every command begins and ends."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from petals_tune.errors import PetalsTuneError

INTERRUPTED = 130  # what a shell calls 128 + SIGINT


def calm_libraries() -> None:
    """What keeps libraries quiet and is read when they are imported, so that it comes first in a command."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars in a file or a pipe
    # A kernel for nf4 on some CPUs that it offers to download: what it has works without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@contextmanager
def errors_reported() -> Iterator[None]:
    """Our own errors print as one text; Ctrl-C exits 130; anything else is a bug and keeps its traceback.

    The exit status is 2 for what the user can mend, and 75 (EX_TEMPFAIL) for what a server or the network did: the same
    command may do later.
    """
    try:
        yield
    except PetalsTuneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if error.fault == "yours" else os.EX_TEMPFAIL)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
