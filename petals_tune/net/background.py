"""Work beside the rest of a process, for as long as the process or its part lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)


def begin(work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
    """Start `work`, which goes on until it is cancelled. Where it fails, the log says that `what` has ended, and why.

    asyncio itself says so only once nobody holds the task any more: for work of a whole process that is at its end.
    """

    def end(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s has ended, by a bug: start this process again", what, exc_info=error)

    task = asyncio.create_task(work)
    task.add_done_callback(end)
    return task
