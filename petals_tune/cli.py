"""How every command ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from petals_tune.errors import PetalsTuneError

INTERRUPTED = 130  # what a shell calls 128 + SIGINT


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
