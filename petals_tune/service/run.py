"""The service as a whole: opens the swarm, loads the model, and serves until it is told to stop."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from omegaconf import DictConfig
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from petals_tune.data.chat_format import ChatFormat
from petals_tune.errors import ConfigError
from petals_tune.files import make_folder
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.convert import model_folder
from petals_tune.model.families import family_of, placeholder_model
from petals_tune.remote.auto import AutoDistributedModelForCausalLM
from petals_tune.sampling import end_ids
from petals_tune.service.adapter_folder import AdapterFolder
from petals_tune.service.app import application
from petals_tune.service.decoding.decoder import Decoder
from petals_tune.service.openai.routes import OpenAI
from petals_tune.service.remote import RemoteModel
from petals_tune.service.served import Served
from petals_tune.service.users.fairness import Fairness
from petals_tune.service.users.keys import Keys
from petals_tune.train.options import Swarm, open_swarm
from petals_tune.tuning.saved import load_tokenizer

logger = logging.getLogger(__name__)


async def run_service(cfg: DictConfig, swarm: Swarm) -> None:
    """Serve until interrupted. Raises ConfigError for options that cannot work, before the swarm is opened."""
    keys = Keys.read(None if cfg.api_keys is None else Path(cfg.api_keys), host=cfg.host)
    if cfg.adapters is not None and not Path(cfg.adapters).is_dir():
        raise ConfigError(f"adapters={cfg.adapters} is no folder", key="adapters", seen=cfg.adapters)
    make_folder(Path(cfg.folder), key="folder")
    with ExitStack() as stack:
        model, tokenizer = await asyncio.to_thread(_opened, cfg, swarm, stack)
        async with _served(cfg, model, tokenizer) as routes:
            await _listen(cfg, routes, keys)


def _opened(cfg: DictConfig, swarm: Swarm, stack: ExitStack) -> tuple[Any, Any]:
    """(the model over its swarm, its tokenizer); the end of `stack` closes them."""
    source = model_folder(cfg.model.source, cfg.model.revision)
    blocks = family_of(placeholder_model(Checkpoint(source, revision=cfg.model.revision).config)).total_blocks
    swarm.check(blocks)
    logger.info("%s ...", swarm.describe_opening(blocks))
    peers = stack.enter_context(open_swarm(swarm, source, blocks, cfg.model.revision))
    model: Any = AutoDistributedModelForCausalLM.from_pretrained(
        source, revision=cfg.model.revision, initial_peers=peers, **swarm.client_options()
    )
    stack.callback(model.remote_blocks.close)
    return model, load_tokenizer(source, None, cfg.model.revision)


@asynccontextmanager
async def _served(cfg: DictConfig, model: Any, tokenizer: Any) -> AsyncIterator[Sequence[BaseRoute]]:
    """The routes of the service over a model."""
    remote, config = RemoteModel(model), model.config.get_text_config()
    most_positions = min(cfg.max_length, getattr(config, "max_position_embeddings", cfg.max_length))
    decoder = Decoder(
        remote,
        tokenizer,
        vocabulary=config.vocab_size,
        ends=frozenset(end_ids(model, tokenizer)),
        most_at_once=cfg.most_at_once,
    )
    names = [cfg.name or str(cfg.model.source), *cfg.aliases]
    adapters = AdapterFolder(
        names,
        None if cfg.adapters is None else Path(cfg.adapters),
        load=model.adapters.load,
        remove=model.adapters.remove,
    )
    served = Served(
        offers=adapters,
        decoder=decoder,
        reader=remote,
        tokenizer=tokenizer,
        format=ChatFormat(tokenizer),
        most_positions=most_positions,
    )
    fairness = Fairness(most_in_flight=cfg.requests_a_key, tokens_a_minute=cfg.tokens_a_minute)

    async def route(request: Request) -> Response:
        hops = await asyncio.to_thread(model.remote_blocks.route)
        return JSONResponse({"route": ", ".join(f"blocks {hop.span} at ...{hop.server.peer[-6:]}" for hop in hops)})

    async with AsyncExitStack() as stack:
        stack.callback(decoder.close)
        await asyncio.to_thread(adapters.look)
        await stack.enter_async_context(adapters.watched())
        routes: list[BaseRoute] = [*OpenAI(served, fairness).routes, Route("/route", route)]
        if importlib.util.find_spec("tinker") is not None:
            tinker = _tinker(cfg, model, decoder, fairness, names=dict.fromkeys(names, most_positions))
            routes += await stack.enter_async_context(tinker)
        yield routes


@asynccontextmanager
async def _tinker(
    cfg: DictConfig, model: Any, decoder: Decoder, fairness: Fairness, *, names: Mapping[str, int]
) -> AsyncIterator[list[Route]]:
    """Tinker's routes, whose records and checkpoints are in a folder of the service's."""
    from petals_tune.service.tinker.routes import Limits, Tinker  # the extra [tinker]
    from petals_tune.service.tinker.runs.adapters import RemoteAdapters

    folder = Path(cfg.folder) / "tinker"
    make_folder(folder, key="folder")
    tinker = Tinker(
        folder,
        RemoteAdapters(model),
        decoder,
        fairness,
        names=names,
        vocabulary=model.get_input_embeddings().weight.shape[0],
        limits=Limits(**cfg.tinker),
    )
    async with tinker.running():
        yield tinker.routes


async def _listen(cfg: DictConfig, routes: Sequence[BaseRoute], keys: Keys) -> None:
    """Serve until interrupted; answers that are being made are waited for, for a while."""
    config = uvicorn.Config(
        application(routes, keys),
        host=cfg.host,
        port=cfg.port,
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=30,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started and not task.done():
        await asyncio.sleep(0.05)
    if server.started:
        port = server.servers[0].sockets[0].getsockname()[1]
        logger.info("http://%s:%s  (OpenAI's interface: /v1, Tinker's: /api/v1)", cfg.host, port)
    await task
