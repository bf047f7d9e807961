"""Command-line entry points: quiet libraries, error reports and exit statuses."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from petals_tune.errors import PetalsTuneError

INTERRUPTED = 130  # exit status after Ctrl-C: 128 + SIGINT, as of a shell


def quiet_libraries() -> None:
    """Turn off progress bars and warnings of libraries. They read this when they are imported: call it first."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a progress bar is noise in a file or a pipe
    # It offers to download an nf4 kernel for some CPUs; its own works.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@contextmanager
def report_errors() -> Iterator[None]:
    """Print our own errors and exit: with 2 where the user can correct it, else with 75 (EX_TEMPFAIL): try again later.

    Ctrl-C exits with 130. Any other exception is a bug and keeps its traceback.
    """
    try:
        yield
    except PetalsTuneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if error.fault == "yours" else os.EX_TEMPFAIL)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
