"""Everything bad, over real streams to a real server process; an honest client is served the same numbers meanwhile.

    python tests/fuzz/stream.py --inputs 5000

Prints how many inputs of each kind were tried and what their sender was told, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from petals_tune.errors import ConnectionLost
from petals_tune.net.peer import Peer, joined
from petals_tune.swarm.local import ServerProcess, server_process
from petals_tune.wire import frames
from petals_tune.wire.codec import encode
from petals_tune.wire.messages import Forwarded, Hello, Message, Ping, Refusal, Welcome
from petals_tune.wire.records import PROTOCOL
from tests.models import save_model
from tests.net.played_peer import PlayedPeer
from tests.servers.peers import SPAN, forward
from tests.servers.requests.test_handler import BAD_REQUESTS, GARBAGE
from tests.wire.test_messages import EXAMPLES

IDLE_STREAMS = 1000
ANSWER_S = 30.0
AFTER_PING_S = 0.2  # for what is computed; messages that are not answered cost this much
WAITS = "waits for the rest"  # of a frame that may yet come; the stream is closed a minute later
Bad = Callable[[random.Random], bytes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000, help="of each kind (2000)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = save_model(Path(folder, "llama"), "llama")
        # The smallest limits that an honest client can live with, so that they are met.
        limits = ["limits.max_message_mb=1", "limits.max_receiving_gb=0.01", "limits.max_positions=64"]
        common = [f"model.source='{source}'", f"blocks='{SPAN}'", "quantization=none", "limits.max_tokens=256"]
        with server_process([*common, *limits]) as server:
            told = asyncio.run(fuzz(server.wait_until_ready(), given.inputs, random.Random(given.seed)))
            check_alive(server)
    for kind, counts in told.items():
        said = ", ".join(f"{what} {count}" for what, count in counts.most_common(4))
        print(f"{kind:<26}{counts.total():>8,}   {said}")
    total = sum(counts.total() for counts in told.values())
    print(json.dumps({"inputs": {kind: counts.total() for kind, counts in told.items()}, "total": total, "crashes": 0}))


def check_alive(server: ServerProcess) -> None:
    bugs = [line for line in server.lines if "a bug while serving" in line or "Traceback" in line]
    assert server.process.poll() is None, "\n".join(server.lines[-20:])
    assert not bugs, "\n".join(server.lines[-40:])


async def fuzz(
    addresses: Sequence[str], inputs: int, chance: random.Random, *, idle: int = IDLE_STREAMS
) -> dict[str, Counter[str]]:
    """What senders were told, by kind. Raises AssertionError where the honest client is not served as before."""
    told: dict[str, Counter[str]] = {}
    async with (
        joined(addresses, listens=False) as honest_peer,
        joined(addresses, listens=False) as bad_peer,
        opened(honest_peer, addresses) as honest,
    ):
        expected = await honest.ask(forward())
        assert isinstance(expected, Forwarded)
        for kind, (bad, whole) in KINDS.items():
            told[kind] = await tried(bad_peer, addresses, bad, inputs, chance, whole=whole)
            await same(honest, expected)
        told["streams without a word"] = await idle_streams(bad_peer, addresses, idle)
        await same(honest, expected)
    return told


async def same(honest: PlayedPeer, expected: Forwarded) -> None:
    answer = await honest.ask(forward())
    assert isinstance(answer, Forwarded), answer
    assert torch.equal(answer.hidden, expected.hidden)


@asynccontextmanager
async def opened(peer: Peer, addresses: Sequence[str], *, greet: bool = True) -> AsyncIterator[PlayedPeer]:
    connection = await peer.transport.dial(addresses[0].rpartition("/p2p/")[2], addresses, PROTOCOL)
    played = PlayedPeer(connection)
    try:
        if greet:
            assert isinstance(await played.ask(Hello()), Welcome)
        yield played
    finally:
        connection.close()


async def tried(
    bad_peer: Peer, addresses: Sequence[str], bad: Bad, inputs: int, chance: random.Random, *, whole: bool
) -> Counter[str]:
    """Send `inputs` bad ones, as the body of a frame (`whole`) or past the frames; a stream that ends is replaced."""
    told: Counter[str] = Counter()
    while told.total() < inputs:
        async with opened(bad_peer, addresses) as peer:
            while told.total() < inputs:
                data = bad(chance)
                try:
                    number = await peer.send(data) if whole else None
                    if not whole:
                        await peer.write(data)
                    answer = await answered(peer, number, await peer.send(Ping()))
                except ConnectionLost:
                    told["closed"] += 1
                    break
                told[answer] += 1
                if answer == WAITS:
                    break
    return told


async def answered(peer: PlayedPeer, number: int | None, ping: int) -> str:
    """What the server says to message `number`, or at all, before it ends the stream or answers the ping behind it.

    A ping is answered at once, and a request when it was computed; messages without an answer are followed by it alone.
    """
    said, heard_ping = "no answer due", False
    while True:
        try:
            async with asyncio.timeout(AFTER_PING_S if heard_ping or number is None else ANSWER_S):
                found, answer = await peer.read()
        except TimeoutError:
            assert heard_ping or number is None, "the server no longer answers"
            return said if heard_ping else WAITS
        except ConnectionLost:
            if said == "no answer due":
                raise
            return f"{said}, closed"
        if found == number or (number is None and found != ping):
            said = answer.error if isinstance(answer, Refusal) else "served"
        heard_ping = heard_ping or found == ping
        if heard_ping and said != "no answer due":
            return said


async def idle_streams(bad_peer: Peer, addresses: Sequence[str], count: int) -> Counter[str]:
    """Open as many streams as we can and say nothing on them."""
    told: Counter[str] = Counter()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(count):
            try:
                peer = await stack.enter_async_context(opened(bad_peer, addresses, greet=False))
                async with asyncio.timeout(0.005):
                    await peer.connection.read_exactly(1)
            except TimeoutError:
                told["open"] += 1
            except ConnectionLost:
                told["closed"] += 1
    return told


def _garbage(chance: random.Random) -> bytes:
    return chance.choice([*GARBAGE.values(), chance.randbytes(chance.randrange(200))])


def _changed(chance: random.Random) -> bytes:
    body = bytearray(encode(chance.choice(EXAMPLES)))
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(body) + 1)
        body[place : place + chance.randrange(4)] = chance.randbytes(chance.randrange(4))
    return bytes(body)


def _truncated(chance: random.Random) -> bytes:
    body = encode(chance.choice(EXAMPLES))
    return body[: chance.randrange(len(body))]


def _bad_request(chance: random.Random) -> bytes:
    request, _ = chance.choice(list(BAD_REQUESTS.values()))
    return encode(request)


def _frames(chance: random.Random) -> bytes:
    """Frames that are cut, repeated, out of order, too long, or no frames at all."""
    message: Message = chance.choice(EXAMPLES)
    with_limit = frames.MAX_FRAME_BYTES
    pieces = [header + bytes(payload) for header, payload in frames.cut(chance.randrange(5), encode(message))]
    header = frames.HEADER.pack(
        chance.choice([0, 1, with_limit, with_limit + 1, 2**32 - 1]), 9, chance.randrange(2**32)
    )
    return chance.choice(
        [
            chance.randbytes(chance.randrange(16, 100)),
            header + chance.randbytes(chance.randrange(16, 100)),
            frames.HEADER.pack(2, 9, 8) + b"ab" + frames.HEADER.pack(2, 9, 8) + b"ab",
            frames.HEADER.pack(2, 9, 8) + b"ab" + frames.HEADER.pack(2, 9, 2) + b"gh",
            2 * pieces[0][: len(pieces[0]) // 2],
        ]
    )


KINDS: dict[str, tuple[Bad, bool]] = {
    "garbage in a frame": (_garbage, True),
    "changed messages": (_changed, True),
    "truncated messages": (_truncated, True),
    "bad requests": (_bad_request, True),
    "broken frames": (_frames, False),
}


if __name__ == "__main__":
    main()
