"""Tinker's paths for training and sampling, as its SDK 0.38 asks for them."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from petals_tune.errors import ConfigError
from petals_tune.service.errors import ServiceError
from petals_tune.service.metrics import Asker, Metrics
from petals_tune.service.tinker.encryption import read_recipients
from petals_tune.service.tinker.listing import Listing
from petals_tune.service.tinker.promises import Promises, Result
from petals_tune.service.tinker.runs import AdamOptions, Run, TrainedModel, Turns, in_thread
from petals_tune.service.tinker.sampling import Sampling
from petals_tune.service.tinker.store import CheckpointRecord, LoRA, RunRecord, Store
from petals_tune.service.tinker.wire import MEDIA_TYPE, read_training_request, training_output
from petals_tune.service.users.fairness import Fairness

Work = Coroutine[Any, Any, Result]
LEAST_TTL_S = 3600


class Tinker:
    """The endpoints. `request.state.owner` is whose key came with a request."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        model: TrainedModel,
        sampling: Sampling,
        fairness: Fairness,
        metrics: Metrics,
        *,
        names: Mapping[str, int],
    ):
        """`folder`: of checkpoints; `names`: of the one model that is served, with its most positions."""
        self._store, self._folder, self._model, self._sampling = store, folder, model, sampling
        self._fairness, self._metrics = fairness, metrics
        self._names, self._name = names, next(iter(names))
        self._promises = Promises()
        self._runs: dict[str, Run] = {}
        self._sessions: dict[str, str] = {}  # owners

    @property
    def routes(self) -> list[Route]:
        posts: dict[str, Callable[[Request], Coroutine[Any, Any, Response]]] = {
            "client/config": self._constant({}),
            "client/dynamic_config": self._constant({"sample_cancel_enabled": True}),
            "telemetry": self._constant({"status": "accepted"}),
            "create_session": self._create_session,
            "session_heartbeat": self._constant({"type": "session_heartbeat"}),
            "sessions/{id}/finish": self._constant({}),
            "create_model": self._create_model,
            "load_weights": self._load_weights,
            "get_info": self._get_info,
            "forward_backward": self._forward_backward,
            "optim_step": self._optim_step,
            "save_weights": self._save_weights,
            "save_weights_for_sampler": self._save_weights_for_sampler,
            "save_weights_external": self._save_weights_external,
            "create_sampling_session": self._create_sampling_session,
            "asample": self._sample,
            "retrieve_future": self._retrieve_future,
            "cancel_future": self._cancel_future,
            "weights_info": self._weights_info,
        }
        return [
            Route("/api/v1/healthz", self._constant({"status": "ok"})),
            Route("/api/v1/get_server_capabilities", self._capabilities),
            *(Route(f"/api/v1/{path}", endpoint, methods=["POST"]) for path, endpoint in posts.items()),
            *Listing(self._store, self._folder).routes,
        ]

    async def close(self) -> None:
        """End what runs."""
        await self._promises.close()

    # Sessions

    def _constant(self, answer: dict[str, Any]) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def endpoint(request: Request) -> Response:
            return JSONResponse(answer)

        return endpoint

    async def _capabilities(self, request: Request) -> Response:
        models = [
            {"model_name": name, "max_context_length": most, "trainable": True, "sampleable": True}
            for name, most in self._names.items()
        ]
        return JSONResponse({"supported_models": models})

    async def _create_session(self, request: Request) -> Response:
        session = secrets.token_hex(16)
        self._sessions[session] = request.state.owner
        return JSONResponse({"type": "create_session", "session_id": session})

    async def _retrieve_future(self, request: Request) -> Response:
        found = await self._promises.poll(request.state.owner, (await _json(request))["request_id"])
        if isinstance(found, bytes):
            return Response(found, media_type=MEDIA_TYPE)
        return JSONResponse(found)

    async def _cancel_future(self, request: Request) -> Response:
        self._promises.cancel(request.state.owner, (await _json(request))["request_id"])
        return JSONResponse({})

    # Runs

    async def _create_model(self, request: Request) -> Response:
        body, owner = await _json(request), request.state.owner
        self._check_model(body["base_model"])
        if body.get("optimizer_config", {}).get("type", "adamw") != "adamw":
            raise ConfigError("AdamW is the optimizer here", key="optimizer_config", seen=body["optimizer_config"])
        lora = msgspec.convert(body.get("lora_config") or {"rank": 32}, LoRA)
        id = _id(body["session_id"], body["model_seq_id"])
        record = self._record(id, owner, body["base_model"], lora, body.get("user_metadata"))

        async def create() -> Result:
            await in_thread(self._begin, record, Turns())
            return {"type": "create_model", "model_id": id}

        return self._promised(owner, create(), "create_model", id)

    async def _load_weights(self, request: Request) -> Response:
        """Begin a run from a checkpoint, or put one into a run that has just begun."""
        body, owner = await _json(request), request.state.owner
        checkpoint, source = self._checkpoint(body["path"], owner)
        folder, with_optimizer = self._folder_of(checkpoint), bool(body["optimizer"])
        new = body.get("session_id") is not None
        id = _id(body["session_id"], body["model_seq_id"]) if new else body["model_id"]
        record = self._record(id, owner, source.base_model, source.lora, body.get("user_metadata"))

        async def load() -> Result:
            if new:
                await in_thread(self._begin, record, Turns())
            run = self._run(id, owner)
            if new:
                await in_thread(run.load, folder, with_optimizer=with_optimizer)
            else:
                async with run.turns.turn(body["seq_id"]):
                    await in_thread(run.load, folder, with_optimizer=with_optimizer)
            return {"type": "load_weights", "path": body["path"], "model_id": id}

        return self._promised(owner, load(), "load_weights", id, str(body.get("seq_id")))

    async def _get_info(self, request: Request) -> Response:
        run = self._run((await _json(request))["model_id"], request.state.owner).record
        return JSONResponse(
            {
                "type": "get_info",
                "model_id": run.id,
                "model_name": run.base_model,
                "model_data": {"model_name": run.base_model, "tokenizer_id": run.base_model},
                "is_lora": True,
                "lora_rank": run.lora.rank,
            }
        )

    async def _forward_backward(self, request: Request) -> Response:
        asked, owner = read_training_request(await request.body()), request.state.owner
        run = self._run(asked.model_id, owner)
        # Not its answers in flight: one whose turn comes early could be refused for those that wait for it.
        self._fairness.check(owner, 0, time.monotonic())

        async def work() -> Result:
            tokens = sum(len(datum.ids) for datum in asked.data)
            self._fairness.charge(owner, tokens, time.monotonic())
            async with run.turns.turn(asked.seq_id), self._fairness.slots.held(owner):
                with self._fairness.in_flight(owner, 0):
                    logprobs, total = await in_thread(run.forward, asked)
            self._metrics.count_tokens(Asker(owner=owner, interface="tinker", model=self._name), "trained", tokens)
            self._store.used(run.record.id)
            return training_output(logprobs, {"loss:sum": total})

        return self._promised(owner, work(), "forward_backward", asked.model_id, str(asked.seq_id))

    async def _optim_step(self, request: Request) -> Response:
        body, owner = await _json(request), request.state.owner
        if "adam_params" not in body:
            raise ConfigError("AdamW is the optimizer here", key="optimizer_params")
        run, options = self._run(body["model_id"], owner), msgspec.convert(body["adam_params"], AdamOptions)

        async def work() -> Result:
            async with run.turns.turn(body["seq_id"]):
                measured = await in_thread(run.step, options)
                self._store.add_metrics(run.record.id, run.steps, measured)
            return {"metrics": measured}

        return self._promised(owner, work(), "optim_step", run.record.id, str(body["seq_id"]))

    # Checkpoints

    async def _save_weights(self, request: Request) -> Response:
        body, owner = await _json(request), request.state.owner
        run, name = self._run(body["model_id"], owner), body.get("path") or f"{body['seq_id']:06d}"

        async def work() -> Result:
            async with run.turns.turn(body["seq_id"]):
                saved = await self._save(run, "weights", name, body)
            return {"type": "save_weights", "path": saved.path}

        return self._promised(owner, work(), "save", run.record.id, str(body["seq_id"]))

    async def _save_weights_for_sampler(self, request: Request) -> Response:
        body, owner = await _json(request), request.state.owner
        run, session = self._run(body["model_id"], owner), body.get("sampling_session_seq_id")
        if body.get("kind", "snapshot") != "snapshot":
            raise ConfigError("a sampling client has weights of its own here: kind='snapshot'", key="kind")
        name = body.get("path") or f"session-{session}"

        async def work() -> Result:
            async with run.turns.turn(body["seq_id"]):
                saved = await self._save(run, "sampler_weights", name, body)
            answer: dict[str, Any] = {"type": "save_weights_for_sampler", "path": saved.path}
            if session is not None:
                answer["sampling_session_id"] = await self._sampling.open(owner, self._folder_of(saved))
            return answer

        return self._promised(owner, work(), "save", run.record.id, str(body["seq_id"]))

    async def _save_weights_external(self, request: Request) -> Response:
        """A checkpoint to download: an adapter in PEFT's format, as all of them are."""
        body, owner = await _json(request), request.state.owner
        recipients = read_recipients(body.get("age_encryption_recipients") or ())
        run = self._run(body["model_id"], owner)

        async def work() -> Result:
            async with run.turns.turn(body["seq_id"]):
                saved = await self._save(run, "external_weights", body["path"], body, recipients)
            return {"type": "save_weights_external", "path": saved.path}

        return self._promised(owner, work(), "save", run.record.id, str(body["seq_id"]))

    async def _save(
        self, run: Run, kind: str, name: str, body: dict[str, Any], recipients: Sequence[Any] = ()
    ) -> CheckpointRecord:
        if not name or not all(each.isalnum() or each in "-_." for each in name) or name.startswith("."):
            raise ConfigError("the name of a checkpoint has letters, digits, '-', '_' and '.'", key="path", seen=name)
        known = next((c for c in self._store.checkpoints(run.record.id) if (c.kind, c.name) == (kind, name)), None)
        if known is not None and kind != "sampler_weights" and not body.get("overwrite"):
            raise ConfigError(f"there is a checkpoint {known.path}: overwrite=True replaces it", key="path", seen=name)
        if (ttl_s := body.get("ttl_seconds")) is not None and ttl_s < LEAST_TTL_S:
            raise ConfigError(f"ttl_seconds is {ttl_s}: {LEAST_TTL_S} or more", key="ttl_seconds", seen=ttl_s)
        folder, now_s = self._folder / run.record.id / kind / name, time.time()
        if known is None:  # what an expired one of this name left is not of this one
            shutil.rmtree(folder, ignore_errors=True)
        size_bytes = await in_thread(run.save, folder, with_optimizer=kind == "weights", recipients=recipients)
        record = CheckpointRecord(
            run=run.record.id,
            kind=kind,
            name=name,
            bytes=size_bytes,
            public=False,
            metadata=body.get("user_metadata") or {},
            created_s=now_s,
            expires_s=None if ttl_s is None else now_s + ttl_s,
        )
        self._store.put_checkpoint(record)
        return record

    async def _weights_info(self, request: Request) -> Response:
        _, run = self._checkpoint((await _json(request))["tinker_path"], request.state.owner)
        lora = run.lora
        return JSONResponse(
            {
                "base_model": run.base_model,
                "is_lora": True,
                "lora_rank": lora.rank,
                "train_unembed": lora.train_unembed,
                "train_mlp": lora.train_mlp,
                "train_attn": lora.train_attn,
            }
        )

    # Sampling

    async def _create_sampling_session(self, request: Request) -> Response:
        body, owner = await _json(request), request.state.owner
        folder = None
        if (path := body.get("model_path")) is not None:
            checkpoint, _ = self._checkpoint(path, owner)
            folder = self._folder_of(checkpoint)
        else:
            self._check_model(body.get("base_model") or "")
        session = await self._sampling.open(owner, folder)
        return JSONResponse({"type": "create_sampling_session", "sampling_session_id": session})

    async def _sample(self, request: Request) -> Response:
        body, owner = await _json(request), request.state.owner
        self._fairness.check(owner, body.get("num_samples", 1), time.monotonic())
        work = self._sampling.sample(owner, body)
        ids = [secrets.token_hex(16) for _ in range(body.get("num_samples", 1))]
        name = ("sample", body["sampling_session_id"], str(body["seq_id"]))
        return JSONResponse(self._promises.make(owner, work, name=name, sample_sequence_ids=ids))

    # What they have in common

    def _promised(self, owner: str, work: Work, *name: str) -> Response:
        return JSONResponse(self._promises.make(owner, work, name=(owner, *name)))

    def _check_model(self, name: str) -> None:
        if name not in self._names:
            known = ", ".join(self._names)
            raise ServiceError(404, f"there is no model {name!r} here: {known}", kind="invalid_request_error")

    @staticmethod
    def _record(id: str, owner: str, base_model: str, lora: LoRA, metadata: Any) -> RunRecord:
        now_s = time.time()
        return RunRecord(
            id=id, owner=owner, base_model=base_model, lora=lora, metadata=metadata or {}, created_s=now_s, used_s=now_s
        )

    def _begin(self, record: RunRecord, turns: Turns) -> None:
        self._model.create(record.id, record.lora)
        self._store.add_run(record)
        self._runs[record.id] = Run(record, self._model, turns)

    def _run(self, id: str, owner: str) -> Run:
        run = self._runs.get(id)
        if run is None or run.record.owner != owner:
            raise ServiceError(404, f"there is no model {id!r} here (any more)", kind="invalid_request_error")
        return run

    def _checkpoint(self, path: str, owner: str) -> tuple[CheckpointRecord, RunRecord]:
        """A checkpoint by its path, and its run. Raises ServiceError (404) where this owner has none of that name."""
        run_id, _, rest = path.removeprefix("tinker://").partition("/")
        run = self._store.run(run_id)
        found = next((each for each in self._store.checkpoints(run_id) if f"{each.kind}/{each.name}" == rest), None)
        if run is None or found is None or not (run.owner == owner or found.public):
            raise ServiceError(404, f"there is no checkpoint {path!r} here", kind="invalid_request_error")
        return found, run

    def _folder_of(self, checkpoint: CheckpointRecord) -> Path:
        return self._folder / checkpoint.run / checkpoint.kind / checkpoint.name


def _id(session: str, number: int) -> str:
    return f"{session}:train:{number}"  # as the SDK counts on


async def _json(request: Request) -> dict[str, Any]:
    try:
        return msgspec.json.decode(await request.body(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"the body of the request is not a JSON object: {error}", key="body") from None
