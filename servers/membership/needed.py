"""Choice of the model that a network lacks most, for a server that may host any."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from petals_tune.config import Model
from petals_tune.errors import ConfigError, PetalsTuneError
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.convert import NEEDED
from petals_tune.model.disk import DiskCache
from petals_tune.net.directory import Directory
from petals_tune.wire.records import ServerRecord, group_by_model, same_model, usual_blocks
from petals_tune.wire.span import BlockSpan
from servers.membership.placement import block_throughputs

logger = logging.getLogger(__name__)

MOST_MODELS = 32  # that are looked at


async def needed_model(directory: Directory, disk: DiskCache) -> Model:
    """Return the model of the network whose slowest block has the lowest throughput, of those that can be read here.

    A model is named by strangers: it is taken where a checkpoint of that name has the digest that its servers announce.
    Raises ConfigError where there is none.
    """
    candidates = []
    for records in group_by_model(await directory.models())[:MOST_MODELS]:
        total_blocks = usual_blocks(records)
        snapshot = await directory.snapshot(records[0].model, BlockSpan(0, total_blocks), thorough=True)
        if snapshot.servers:
            servers = [*snapshot.servers, *snapshot.joining]
            slowest = float(block_throughputs(servers, total_blocks, snapshot.stands_for).min())
            candidates.append((slowest, snapshot.servers[0]))
    for slowest, record in sorted(candidates, key=lambda candidate: (candidate[0], candidate[1].model_name)):
        if await asyncio.to_thread(_is_readable, record, disk):
            logger.warning(
                "hosts %s: its slowest block has %.3g tokens/s, the least of %d models",
                *(record.model_name, slowest, len(candidates)),
            )
            return Model(source=record.model_name, revision=record.revision or None)
    raise ConfigError(
        f"model=needed: none of the {len(candidates)} models of the network can be read here; name one:  model=NAME",
        key="model.source",
        seen=NEEDED,
    )


def _is_readable(record: ServerRecord, disk: DiskCache) -> bool:
    """Whether there is a checkpoint on the hub, or in a folder here, of the name and the digest of `record`."""
    name = record.model_name
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        return False  # a folder of another machine
    try:
        return same_model(Checkpoint(name, disk, record.revision or None).digest, record.model)
    except PetalsTuneError as error:
        logger.info("the network's model %s is passed over: %s", name, error)
        return False
