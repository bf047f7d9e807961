"""For all tests: one thread, no hub, no timed assertions, and no process left behind."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported, and inherited by the servers that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

from petals_tune.model.convert import EMBEDDED_NAME, cache_folder
from tests.processes import mark_this_run, servers_of_this_run, wait_until

mark_this_run()
# A shell ignores Ctrl-C for what it starts in the background, and all that this starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def keep_caches_apart() -> None:
    """What servers of this run measure and quantize goes when it ends; the embedded model, slow to convert, stays."""
    converted = cache_folder() / EMBEDDED_NAME
    if converted.is_dir():  # the first run on a machine converts it, to where the next one finds it
        own = Path(tempfile.mkdtemp(prefix="petals_tune-"))
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        (own / EMBEDDED_NAME).symlink_to(converted)
        os.environ["PETALS_TUNE_CACHE"] = str(own)


keep_caches_apart()

settings.register_profile("petals_tune", deadline=None, derandomize=True)
settings.load_profile("petals_tune")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of small models; each is made once."""
    from tests.models import save_model  # imports transformers

    made: dict[tuple[object, ...], Path] = {}

    def folder(family: str, **changes: object) -> Path:
        key = (family, repr(sorted(changes.items())))
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp("models") / family, family, **changes)
        return made[key]

    return folder


@pytest.fixture(scope="session")
def mixture_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of small mixtures of experts; each is made once."""
    from tests.mixtures import save_mixture  # imports transformers

    made: dict[tuple[object, ...], Path] = {}

    def folder(family: str, **changes: object) -> Path:
        key = (family, repr(sorted(changes.items())))
        if key not in made:
            made[key] = save_mixture(tmp_path_factory.mktemp("mixtures") / family, family, **changes)
        return made[key]

    return folder


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fails the run where servers or p2p daemons that it started are still there at its end; ends them."""
    yield
    try:
        wait_until(lambda: not servers_of_this_run(), "the end of all servers and daemons that this run started")
    finally:
        left = servers_of_this_run()
        for process in left:
            os.kill(process.id, signal.SIGKILL)
        assert not left, f"this run leaves processes behind: {left}"
