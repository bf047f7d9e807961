"""Generation along a route: KV caches on the servers, and the inputs kept here, so that a lost span can be replayed.

Shapes: B rows, S new positions, H hidden size.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from petals_tune.errors import RequestRefused, Retriable, ServerError
from petals_tune.swarm.chain import Chain
from petals_tune.swarm.hand_over import Ask, Relay
from petals_tune.swarm.retry import Attempts
from petals_tune.swarm.route import Hop
from petals_tune.swarm.trace import CallContext
from petals_tune.wire.adapter import AdapterVersion
from petals_tune.wire.messages import CloseSession, Message, OpenSession, SessionOpened, Step, Stepped
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import in_format

REPLAY_POSITIONS = 512  # positions that go through the blocks at once when a prompt is read or replayed


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a span was given for some positions."""

    hidden: torch.Tensor  # (B, S, H)
    padding: torch.Tensor | None  # (B, S) bool
    positions: torch.Tensor | None  # (B or 1, S) int64

    def __len__(self) -> int:
        return self.hidden.shape[1]

    def cut(self, start: int, stop: int) -> Inputs:
        return Inputs(
            hidden=self.hidden[:, start:stop],
            padding=None if self.padding is None else self.padding[:, start:stop],
            positions=None if self.positions is None else self.positions[:, start:stop],
        )

    def with_hidden(self, hidden: torch.Tensor) -> Inputs:
        return Inputs(hidden=hidden, padding=self.padding, positions=self.positions)

    def rows(self, order: torch.Tensor) -> Inputs:
        positions = self.positions
        return Inputs(
            hidden=self.hidden[order],
            padding=None if self.padding is None else self.padding[order],
            positions=positions[order] if positions is not None and positions.shape[0] > 1 else positions,
        )


@dataclass
class History:
    """The inputs of a span so far. Reordering rows composes indices; tensors are gathered when they are replayed."""

    parts: list[tuple[Inputs, torch.Tensor | None]] = field(default_factory=list)  # None: rows as they came
    length: int = 0  # positions

    def add(self, inputs: Inputs) -> None:
        self.parts.append((inputs, None))
        self.length += len(inputs)

    def reorder(self, order: torch.Tensor) -> None:
        self.parts = [(inputs, order if rows is None else rows[order]) for inputs, rows in self.parts]

    def cut(self, length: int) -> None:
        """Forget what lies behind the first `length` positions. From the end: a token forgets nothing, and is quick."""
        while self.length > length:
            inputs, rows = self.parts.pop()
            self.length -= len(inputs)
            if self.length < length:
                self.parts.append((inputs.cut(0, length - self.length), rows))
                self.length = length

    def replayed(self) -> list[Inputs]:
        return [inputs if rows is None else inputs.rows(rows) for inputs, rows in self.parts]


@dataclass
class _Station:
    """One server of the route, with the session that it keeps for us."""

    hop: Hop
    session: int
    history: History = field(default_factory=History)
    order: torch.Tensor | None = None  # rows to reorder with the next step


class ChainSession:
    """KV caches for `rows` rows of at most `max_length` positions on all blocks of `span`. On the background loop."""

    def __init__(self, chain: Chain, span: BlockSpan, *, rows: int, max_length: int, adapter: AdapterVersion | None):
        self.rows, self.max_length = rows, max_length
        self._chain, self._client = chain, chain.client
        self._span, self._context = span, CallContext(adapter=adapter)
        self._stations: list[_Station] = []

    async def step(self, inputs: Inputs, *, position: int, order: torch.Tensor | None) -> torch.Tensor:
        """The output (B, S, H) of the blocks for the positions from `position` on; what lay behind is forgotten.

        With `order`, the caches of row i become those of row order[i] first. When a server is lost, another route is
        found for its blocks alone, and their inputs so far are replayed there.
        Raises RequestRefused where `max_length` is exceeded or nobody has room, and what `Chain.forward` raises.
        """
        if position + len(inputs) > self.max_length:
            raise RequestRefused(
                f"the session was opened for max_length={self.max_length} positions and this step would reach "
                f"{position + len(inputs)}; open it with a larger max_length"
            )
        for station in self._stations:
            station.history.cut(position)
            if order is not None:
                station.history.reorder(order)
                station.order = order if station.order is None else station.order[order]
        attempts = Attempts(self._client.policy, time.monotonic())
        if not self._stations:
            await self._extend(self._span, [], attempts)
        outputs = []
        for start in range(0, len(inputs), REPLAY_POSITIONS):
            part = inputs.cut(start, start + REPLAY_POSITIONS)
            outputs.append(await self._step(part, position + start, attempts))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    async def close(self) -> None:
        """Give the caches back."""
        for station in self._stations:
            await self._leave(station)
        self._stations = []

    async def _step(self, inputs: Inputs, position: int, attempts: Attempts) -> torch.Tensor:
        number = 0
        async with Relay(self._client, self._chain.hand_overs, self._asks) as relay:
            stations = list(self._stations)  # those that are lost give their places to others
            relay.send_ahead([each.hop for each in stations], lambda n: self._request(stations[n], inputs, position))
            while number < len(self._stations):
                station = self._stations[number]
                try:
                    output = await self._ask(station, inputs, position, relay.ask)
                except ServerError as error:
                    await self._chain.pause(attempts, error)
                    await self._replace(number, attempts)
                    continue
                station.history.add(inputs)
                inputs = inputs.with_hidden(output)
                self._chain.moved_on(attempts)
                number += 1
        return inputs.hidden

    def _request(self, station: _Station, inputs: Inputs, position: int) -> Step:
        return Step(
            session=station.session,
            hidden=in_format(inputs.hidden, self._chain.wire_format),
            position=position,
            padding=inputs.padding,
            positions=inputs.positions,
            order=station.order,
            reply_format=self._chain.wire_format,
        )

    async def _asks(self, hop: Hop, message: Message) -> Message:
        return await self._client.ask(hop.server, message)  # the session has the adapter

    async def _ask(self, station: _Station, inputs: Inputs, position: int, ask: Ask) -> torch.Tensor:
        reply = await ask(station.hop, self._request(station, inputs, position))
        if not isinstance(reply, Stepped):
            raise self._chain.bad_reply(station.hop, f"a {type(reply).__name__} in answer to Step")
        station.order = None
        return self._chain.checked(station.hop, reply.hidden, inputs.hidden)

    async def _replace(self, number: int, attempts: Attempts) -> None:
        """Put other servers in the place of station `number`, and bring them to where it was."""
        lost = self._stations.pop(number)
        await self._leave(lost)
        rest = self._stations[number:]
        del self._stations[number:]
        await self._extend(lost.hop.span, lost.history.replayed(), attempts)
        self._stations += rest

    async def _extend(self, span: BlockSpan, replay: list[Inputs], attempts: Attempts) -> None:
        """Add stations for `span` that have seen `replay`."""
        start = span.start
        while start < span.stop:
            try:
                for hop in await self._client.route(BlockSpan(start, span.stop), work=self.rows):
                    station = await self._open(hop)
                    seen, position = [], 0
                    for inputs in replay:
                        output = await self._ask(station, inputs, position, self._asks)
                        seen.append(inputs.with_hidden(output))
                        station.history.add(inputs)
                        position += len(inputs)
                    self._stations.append(station)
                    replay, start = seen, hop.span.stop
                    self._chain.moved_on(attempts)
            except Retriable as error:
                await self._chain.pause(attempts, error)

    async def _open(self, hop: Hop) -> _Station:
        adapted = self._context.adapter if self._context.adapter_on(hop.span) else None
        request = OpenSession(
            span=hop.span,
            rows=self.rows,
            max_length=self.max_length,
            adapter=None if adapted is None else adapted.version,
        )
        reply = await self._chain.uploads.ask(hop, request, self._context)
        if not isinstance(reply, SessionOpened):
            raise self._chain.bad_reply(hop, f"a {type(reply).__name__} in answer to OpenSession")
        return _Station(hop=hop, session=reply.session)

    async def _leave(self, station: _Station) -> None:
        stream = self._client.open_stream(station.hop.server)
        if stream is not None:
            await stream.notify(CloseSession(session=station.session))
