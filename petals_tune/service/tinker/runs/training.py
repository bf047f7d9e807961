"""Requests of runs: forward and backward, optimizer steps, checkpoints; each is done in its turn.

A request of a run is answered with a promise as soon as its number is known, also where the rest of it is wrong: the
client counts on, so that the next requests wait for the turn of this one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from petals_tune.errors import ConfigError, DataError, PetalsTuneError
from petals_tune.service.errors import ServiceError
from petals_tune.service.metrics import Asker, Metrics
from petals_tune.service.tinker.bodies import CreateModel, LoadWeights, Numbered, OptimStep, SaveWeights, read
from petals_tune.service.tinker.checkpoints import AUTOSAVE, Checkpoints
from petals_tune.service.tinker.encryption import read_recipients
from petals_tune.service.tinker.promises import Kind, Plan, Result
from petals_tune.service.tinker.records import LoRA, RunRecord, SessionRecord
from petals_tune.service.tinker.runs.live import LiveRuns
from petals_tune.service.tinker.runs.run import AdamOptions, Run
from petals_tune.service.tinker.runs.turns import in_thread
from petals_tune.service.tinker.samplers import Samplers
from petals_tune.service.tinker.store import Store
from petals_tune.service.tinker.wire import parse_training_request, read_training_request, training_output
from petals_tune.service.users.fairness import Fairness

logger = logging.getLogger(__name__)

UNNAMED = "session-"  # names of sampler weights that their owner did not name begin so

Work = Callable[[Run, bytes], Awaitable[Result]]


class Training:
    """Kinds of requests of runs, for `Promises`."""

    def __init__(
        self,
        store: Store,
        live: LiveRuns,
        checkpoints: Checkpoints,
        samplers: Samplers,
        fairness: Fairness,
        metrics: Metrics,
        *,
        names: Mapping[str, int],
        autosave_s: float | None,
    ):
        """names: of the one model that is served, with its most positions; autosave_s: between checkpoints of a run."""
        self._store, self._live, self._checkpoints, self._samplers = store, live, checkpoints, samplers
        self._fairness, self._metrics = fairness, metrics
        self._names, self._autosave_s = names, autosave_s
        self._saved_s: dict[str, float] = {}  # when a run was saved last, or first seen

    @property
    def kinds(self) -> dict[str, Kind]:
        of_runs: dict[str, Work] = {
            "optim_step": self._optim_step,
            "save_weights": self._save_weights,
            "save_weights_for_sampler": self._save_weights_for_sampler,
            "save_weights_external": self._save_weights_external,
        }
        return {
            "create_model": Kind(plan=self._create_model),
            "load_weights": Kind(plan=self._load_weights),
            "forward_backward": Kind(plan=self._forward_backward),
            **{name: Kind(plan=self._planned(work)) for name, work in of_runs.items()},
        }

    def check_model(self, name: str) -> None:
        """Raises ServiceError (404) for a model that is not served."""
        if name not in self._names:
            known = ", ".join(self._names)
            raise ServiceError(404, f"there is no model {name!r} here: {known}", kind="invalid_request_error")

    # Runs begin

    def _create_model(self, owner: str, body: bytes) -> Plan:
        asked = read(body, CreateModel)
        self.check_model(asked.base_model)
        _check_optimizer(asked.optimizer_config)
        lora = asked.lora_config or LoRA(rank=32)
        record = self._record(asked.session_id, asked.model_seq_id, owner, asked.base_model, lora, asked.user_metadata)

        async def create() -> Result:
            await self._live.begin(record)
            return {"type": "create_model", "model_id": record.id}

        return Plan(name=(record.id,), work=create)

    def _load_weights(self, owner: str, body: bytes) -> Plan:
        """Begin a run from a checkpoint, or put one into a run."""
        asked = read(body, LoadWeights)
        if asked.session_id is None or asked.model_seq_id is None:
            return self._planned(self._put_weights)(owner, body)
        _check_optimizer(asked.optimizer_config)
        checkpoint, source = self._checkpoints.find(asked.path, owner)
        base_model = asked.base_model or source.base_model
        self.check_model(base_model)
        record = self._record(asked.session_id, asked.model_seq_id, owner, base_model, source.lora, asked.user_metadata)

        async def load() -> Result:
            folder = self._checkpoints.folder_of(checkpoint)
            await self._live.begin(record, folder, with_optimizer=asked.optimizer)
            return {"type": "load_weights", "path": asked.path, "model_id": record.id}

        return Plan(name=(record.id,), work=load)

    def _record(
        self, session: str, number: int, owner: str, base_model: str, lora: LoRA, metadata: dict[str, Any] | None
    ) -> RunRecord:
        """Of a new run. Raises ServiceError (404) for a session that this owner does not have."""
        if self._store.one(SessionRecord, id=session, owner=owner) is None:
            raise ServiceError(404, f"there is no session {session!r} here", kind="invalid_request_error")
        now_s = time.time()
        return RunRecord(
            id=f"{session}:train:{number}",  # as the SDK counts on
            owner=owner,
            session=session,
            base_model=base_model,
            lora=lora,
            metadata=metadata or {},
            created_s=now_s,
            used_s=now_s,
        )

    # Requests of a run

    def _planned(self, work: Work) -> Callable[[str, bytes], Plan]:
        """Plans of requests whose work is done in the turn of their numbers."""

        def plan(owner: str, body: bytes) -> Plan:
            asked = read(body, Numbered)
            return self._plan(work, owner, body, asked.model_id, asked.seq_id)

        return plan

    def _forward_backward(self, owner: str, body: bytes) -> Plan:
        message = parse_training_request(body)
        plan = self._plan(self._forward, owner, body, message.model_id, message.seq_id)
        # Not answers in flight: one whose turn comes early could be refused for those that wait for it.
        return replace(plan, check=lambda: self._fairness.check(owner, 0, time.monotonic()))

    def _plan(self, work: Work, owner: str, body: bytes, run_id: str, number: int) -> Plan:
        self._live.check(run_id, owner)

        async def in_turn() -> Result:
            async with self._live.turn(run_id, owner, number) as run:
                self._store.change(RunRecord, {"used_s": time.time()}, id=run_id)
                return await work(run, body)

        return Plan(name=(run_id, str(number)), work=in_turn, run=run_id)

    async def _forward(self, run: Run, body: bytes) -> Result:
        def work() -> tuple[Result, int]:
            asked = read_training_request(body)
            most = max(self._names.values())
            tokens = [len(datum.ids) for datum in asked.data]
            if tokens and max(tokens) > most:
                raise DataError(f"a text has {max(tokens)} tokens, and this model takes {most}", column="model_input")
            logprobs, total = run.forward(asked)
            return training_output(logprobs, {"loss:sum": total}), sum(tokens)

        owner, name = run.record.owner, next(iter(self._names))
        async with self._fairness.slots.held(owner):
            with self._fairness.in_flight(owner, 0):
                result, tokens = await in_thread(work)
        self._fairness.charge(owner, tokens, time.monotonic())
        self._metrics.count_tokens(Asker(owner=owner, interface="tinker", model=name), "trained", tokens)
        return result

    async def _optim_step(self, run: Run, body: bytes) -> Result:
        asked = read(body, OptimStep)
        _check_optimizer(asked.optimizer_params)
        measured = await in_thread(run.step, asked.adam_params or AdamOptions())
        self._store.add_metrics(run.record.id, run.steps, measured)
        await self._autosave(run)
        return {"metrics": measured}

    async def _put_weights(self, run: Run, body: bytes) -> Result:
        asked = read(body, LoadWeights)
        checkpoint, _ = self._checkpoints.find(asked.path, run.record.owner)
        folder = self._checkpoints.folder_of(checkpoint)
        await in_thread(run.load, folder, with_optimizer=asked.optimizer)
        return {"type": "load_weights", "path": asked.path, "model_id": run.record.id}

    # Checkpoints

    async def _save_weights(self, run: Run, body: bytes) -> Result:
        asked = read(body, SaveWeights)
        if asked.path is None:
            asked.path = f"{run.steps:06d}"
        saved = await in_thread(self._checkpoints.save, run, "weights", asked)
        self._saved_s[run.record.id] = time.monotonic()
        return {"type": "save_weights", "path": saved.path}

    async def _save_weights_for_sampler(self, run: Run, body: bytes) -> Result:
        asked = read(body, SaveWeights)
        if asked.kind != "snapshot":
            raise ConfigError("a sampling client has weights of its own here: kind='snapshot'", key="kind")
        session = asked.sampling_session_seq_id
        name = f"{UNNAMED}{session}" if asked.path is None else None
        saved = await in_thread(self._checkpoints.save, run, "sampler_weights", asked, name=name)
        answer: dict[str, Any] = {"type": "save_weights_for_sampler", "path": saved.path}
        if session is not None:
            record = run.record
            answer["sampling_session_id"] = self._samplers.open(
                record.owner, record.session, record.base_model, saved.path
            )
        return answer

    async def _save_weights_external(self, run: Run, body: bytes) -> Result:
        """A checkpoint to download: an adapter in PEFT's format, as all of them are."""
        asked = read(body, SaveWeights)
        recipients = read_recipients(asked.age_encryption_recipients or ())
        if asked.path is None:
            raise ConfigError("a checkpoint to download needs a name", key="path")
        saved = await in_thread(self._checkpoints.save, run, "external_weights", asked, recipients=recipients)
        return {"type": "save_weights_external", "path": saved.path}

    async def _autosave(self, run: Run) -> None:
        """Save a run that was not saved for long: a kill then takes no more than that."""
        id, now_s = run.record.id, time.monotonic()
        if self._autosave_s is not None and now_s - self._saved_s.setdefault(id, now_s) >= self._autosave_s:
            self._saved_s[id] = now_s
            try:
                await in_thread(self._checkpoints.save, run, "weights", SaveWeights(), name=AUTOSAVE)
            except PetalsTuneError as error:  # the step was taken all the same
                logger.warning("run %s is not saved: %s", id, error)


def _check_optimizer(config: dict[str, Any] | None) -> None:
    if config is not None and config.get("type", "adamw") != "adamw":
        raise ConfigError(
            f"the optimizer {config['type']!r} is not here: AdamW is (AdamParams)", key="optimizer", seen=config["type"]
        )
