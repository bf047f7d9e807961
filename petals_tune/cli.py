"""How every command ends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from petals_tune.errors import PetalsTuneError

INTERRUPTED = 130  # what a shell calls 128 + SIGINT


@contextmanager
def errors_reported() -> Iterator[None]:
    """Our own errors print as one text and exit 2; Ctrl-C exits 130; anything else keeps its traceback."""
    try:
        yield
    except PetalsTuneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
