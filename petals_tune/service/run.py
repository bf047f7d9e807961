"""The service as a whole: opens the swarm, loads the model, and serves until it is told to stop."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop
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
from petals_tune.service.decoding.decoder import Decoder
from petals_tune.service.errors import stopping
from petals_tune.service.metrics import Metrics
from petals_tune.service.openai.routes import OpenAI
from petals_tune.service.remote import RemoteModel
from petals_tune.service.served import Offers, Served
from petals_tune.service.tuning.opened import opened_tuning
from petals_tune.service.users.fairness import Fairness
from petals_tune.service.users.keys import Keys
from petals_tune.service.users.slots import Slots
from petals_tune.service.web.app import application
from petals_tune.service.web.middleware import Doors
from petals_tune.service.web.server import bound, serve
from petals_tune.train.options import Swarm, open_swarm
from petals_tune.tuning.saved import load_tokenizer

if TYPE_CHECKING:
    from petals_tune.service.tinker.routes import Tinker  # the extra [tinker]

logger = logging.getLogger(__name__)

_FURTHER_THREADS = 8  # for what takes no slot: preparing prompts, loading adapters, records


@dataclass(frozen=True, kw_only=True)
class Core:
    """What the parts of the service share."""

    cfg: DictConfig
    model: Any  # over its swarm
    remote: RemoteModel
    decoder: Decoder
    fairness: Fairness
    metrics: Metrics
    adapters: AdapterFolder
    names: Mapping[str, int]  # of the base model, with its most positions
    at_stop: list[Callable[[], None]] = field(default_factory=list)  # called once no new requests are taken


def run_service(cfg: DictConfig, swarm: Swarm) -> None:
    """Serve until interrupted. Raises ConfigError for options that cannot work, before the swarm is opened."""
    keys = Keys.read(None if cfg.api_keys is None else Path(cfg.api_keys), host=cfg.host)
    if cfg.adapters is not None and not Path(cfg.adapters).is_dir():
        raise ConfigError(f"adapters={cfg.adapters} is no folder", key="adapters", seen=cfg.adapters)
    make_folder(Path(cfg.folder), key="folder")
    with ExitStack() as stack:
        at = stack.enter_context(bound(cfg.host, cfg.port))
        model, tokenizer, peers = _opened(cfg, swarm, stack)

        async def run() -> None:
            async with (
                service(cfg, model, tokenizer) as (core, routes),
                opened_tuning(cfg, swarm, peers, core.adapters, model.adapters, core.names) as tuning,
            ):
                doors = Doors()
                await serve(
                    application([*routes, *tuning], keys, doors=doors, metrics=core.metrics),
                    doors,
                    at,
                    stop_s=cfg.stop_s,
                    busy=lambda: core.fairness.busy,
                    stopped=lambda: [each() for each in core.at_stop],
                    end=lambda: core.decoder.end(stopping()),
                    started=lambda: logger.info(
                        "http://%s:%s  (OpenAI's interface: /v1, Tinker's: /api/v1)", cfg.host, at.getsockname()[1]
                    ),
                )

        uvloop.run(run())


def _opened(cfg: DictConfig, swarm: Swarm, stack: ExitStack) -> tuple[Any, Any, list[str]]:
    """(the model over its swarm, its tokenizer, the swarm's peers); the end of `stack` closes them."""
    source = model_folder(cfg.model.source, cfg.model.revision)
    blocks = family_of(placeholder_model(Checkpoint(source, revision=cfg.model.revision).config)).total_blocks
    swarm.check(blocks)
    logger.info("%s ...", swarm.describe_opening(blocks))
    peers = stack.enter_context(open_swarm(swarm, source, blocks, cfg.model.revision))
    model: Any = AutoDistributedModelForCausalLM.from_pretrained(
        source, revision=cfg.model.revision, initial_peers=peers, **swarm.client_options()
    )
    stack.callback(model.remote_blocks.close)
    return model, load_tokenizer(source, None, cfg.model.revision), peers


@asynccontextmanager
async def service(cfg: DictConfig, model: Any, tokenizer: Any) -> AsyncIterator[tuple[Core, Sequence[BaseRoute]]]:
    """(What the parts share, all routes of the service) over a model."""
    # asyncio's own pool has few threads: training, which holds one for long, would keep chats waiting.
    threads = ThreadPoolExecutor(cfg.most_at_once + _FURTHER_THREADS, thread_name_prefix="work")
    asyncio.get_running_loop().set_default_executor(threads)
    config = model.config.get_text_config()
    most_positions = min(cfg.max_length, getattr(config, "max_position_embeddings", cfg.max_length))
    slots = Slots(cfg.most_at_once)
    fairness = Fairness(
        slots=slots,
        most_in_flight=cfg.requests_a_key,
        most_waiting=cfg.most_waiting,
        tokens_a_minute=cfg.tokens_a_minute,
    )
    metrics, remote = Metrics(slots), RemoteModel(model)
    decoder = Decoder(
        remote,
        tokenizer,
        fairness,
        metrics,
        vocabulary=config.vocab_size,
        ends=frozenset(end_ids(model, tokenizer)),
    )
    names = dict.fromkeys([cfg.name or str(cfg.model.source), *cfg.aliases], most_positions)
    adapters = AdapterFolder(
        list(names),
        None if cfg.adapters is None else Path(cfg.adapters),
        load=model.adapters.load,
        remove=model.adapters.remove,
        but_not=[Path(cfg.folder) / part for part in ("tinker", "tuning")],
    )
    offers: list[Offers] = [adapters]
    served = Served(
        offers=offers,
        decoder=decoder,
        reader=remote,
        tokenizer=tokenizer,
        format=ChatFormat(tokenizer),
        most_positions=most_positions,
    )
    core = Core(
        cfg=cfg,
        model=model,
        remote=remote,
        decoder=decoder,
        fairness=fairness,
        metrics=metrics,
        adapters=adapters,
        names=names,
    )
    async with AsyncExitStack() as stack:
        stack.callback(decoder.close)
        await asyncio.to_thread(adapters.look)
        await stack.enter_async_context(adapters.watched())
        routes: list[BaseRoute] = [*OpenAI(served, fairness, metrics).routes, Route("/route", _route_of(model))]
        if has_tinker():
            tinker = await stack.enter_async_context(_tinker(core))
            offers.append(tinker.offers)
            routes += tinker.routes
        yield core, routes


def has_tinker() -> bool:
    """Is the extra [tinker] installed? The SDK alone, which a client on this machine may have, is not enough."""
    missing = [name for name in ("tinker", "pyrage") if importlib.util.find_spec(name) is None]
    if missing:
        logger.info(
            "Tinker's interface is not served: pip install 'petals_tune[tinker]' brings %s", " and ".join(missing)
        )
    return not missing


def _route_of(model: Any) -> Any:
    async def route(request: Request) -> Response:
        hops = await asyncio.to_thread(model.remote_blocks.route)
        return JSONResponse({"route": ", ".join(f"blocks {hop.span} at ...{hop.server.peer[-6:]}" for hop in hops)})

    return route


@asynccontextmanager
async def _tinker(core: Core) -> AsyncIterator[Tinker]:
    """Tinker's interface, whose records and checkpoints are in the service's folder."""
    from petals_tune.service.tinker.routes import Limits, Tinker  # the extra [tinker]
    from petals_tune.service.tinker.runs.adapters import RemoteAdapters

    folder = Path(core.cfg.folder) / "tinker"
    make_folder(folder, key="folder")
    tinker = Tinker(
        folder,
        RemoteAdapters(core.model),
        core.decoder,
        core.fairness,
        core.metrics,
        names=core.names,
        vocabulary=core.model.get_input_embeddings().weight.shape[0],
        limits=Limits(**core.cfg.tinker),
    )
    core.at_stop.append(tinker.stop)
    async with tinker.running():
        yield tinker
