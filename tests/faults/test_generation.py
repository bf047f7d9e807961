"""Servers that die or hang in the middle of a generation: the tokens are those of an undisturbed run."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from petals_tune.errors import RequestRefused, ServerBusy, SwarmTimeout
from petals_tune.remote.auto import AutoDistributedModelForCausalLM
from petals_tune.swarm.local import ServerProcess, local_swarm, server_process
from petals_tune.swarm.retry import RetryPolicy
from tests.models import VOCABULARY, plain_model, save_model
from tests.raising import raises

NEW = 12
CACHE_POSITIONS = 40
POSITION_BYTES = 6 * 2 * 32 * 4  # blocks, keys and values, hidden size, float32

pytestmark = pytest.mark.swarm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "bloom", "bloom")


class Swarm:
    """Servers as processes that a test can signal, by their peer ids."""

    def __init__(self, remote: PreTrainedModel, processes: dict[str, ServerProcess]):
        self.remote, self.processes = remote, processes

    def send(self, peer: str, number: signal.Signals) -> None:
        os.kill(self.processes[peer].process.pid, number)


@contextmanager
def swarm_of(folder: Path, spans: Sequence[str]) -> Iterator[Swarm]:
    common = [f"model.source='{folder}'", "quantization=none", "threads=1"]
    with ExitStack() as stack:
        started = [stack.enter_context(server_process([*common, f"blocks='{spans[0]}'"]))]
        addresses = started[0].wait_until_ready()
        join = f"swarm.initial_peers=[{','.join(addresses)}]"
        started += [stack.enter_context(server_process([*common, f"blocks='{span}'", join])) for span in spans[1:]]
        processes = {each.wait_until_ready()[0].rpartition("/")[2]: each for each in started}
        remote = AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=addresses)
        stack.callback(remote.remote_blocks.close)
        yield Swarm(remote, processes)


class AtTokens(BaseStreamer):
    """Calls functions when so many tokens are there: the generation waits for it, so the fault is in its middle."""

    def __init__(self, calls: dict[int, Callable[[], None]]):
        self.calls, self.tokens = calls, 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += 1
        if call := self.calls.pop(self.tokens, None):
            call()

    def end(self) -> None:
        pass


def prompt() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, 7), generator=torch.Generator().manual_seed(0))


def generated(model: Any, **options: Any) -> torch.Tensor:
    ids = prompt()
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **{**length, **options}
    )


def stations(session: Any) -> list[tuple[str, str]]:
    """(span, peer) of the servers that keep the session now."""
    (remote,) = session._session._sessions  # no local blocks stand before or behind them
    return [(str(station.hop.span), station.hop.server.peer) for station in remote._sessions]


def test_two_servers_killed_one_after_the_other_and_replaced_by_a_different_cut(folder):
    with swarm_of(folder, ["0:3", "3:6", "3:6", "2:5", "5:6"]) as swarm, torch.no_grad():
        expected = generated(plain_model(folder))
        killed = []
        with swarm.remote.inference_session(max_length=32) as session:

            def kill() -> None:
                span, peer = stations(session)[1]
                swarm.send(peer, signal.SIGKILL)
                swarm.processes[peer].process.wait()
                killed.append((span, peer))

            found = generated(swarm.remote, streamer=AtTokens({4: kill, 8: kill}))
            left = stations(session)
        assert torch.equal(found, expected)
        assert [span for span, _ in killed] == ["3:6", "3:6"]
        assert len({peer for _, peer in killed}) == 2
        assert [span for span, _ in left] == ["0:3", "3:5", "5:6"]
        assert swarm.remote.remote_blocks.stats.retries >= 2


def test_a_stopped_server_is_left_and_its_blocks_are_replayed_elsewhere(folder):
    with swarm_of(folder, ["0:6", "0:6"]) as swarm, torch.no_grad():
        expected = generated(plain_model(folder))
        stopped = []
        with swarm.remote.inference_session(max_length=32) as session:

            def stop() -> None:
                ((_, peer),) = stations(session)
                swarm.send(peer, signal.SIGSTOP)
                stopped.append(peer)

            try:
                found = generated(swarm.remote, streamer=AtTokens({5: stop}))
            finally:
                for peer in stopped:
                    swarm.send(peer, signal.SIGCONT)
            ((_, peer),) = stations(session)
        assert torch.equal(found, expected)
        assert stopped
        assert peer not in stopped
        assert swarm.remote.remote_blocks.stats.retries >= 1


def test_a_cache_that_is_too_small_says_what_would_fit_and_a_client_that_leaves_makes_room(folder):
    limit = f"limits.max_cache_gb={CACHE_POSITIONS * POSITION_BYTES / 2**30:.12f}"
    with local_swarm(str(folder), spans=["0:6"], quantization="none", overrides=[limit]) as peers, torch.no_grad():

        def client(timeout_s: float) -> PreTrainedModel:
            policy = RetryPolicy(timeout_s=timeout_s)
            return AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=peers, policy=policy)

        expected = generated(plain_model(folder))
        first, second = client(30), client(1)
        try:
            with (
                first.inference_session(max_length=CACHE_POSITIONS + 1),
                raises(RequestRefused, limit="max_cache_gb", max_length=CACHE_POSITIONS),
            ):
                generated(first)
            fed = (
                7 + NEW - 1
            )  # positions that the first holds, less than its share; from 17 on a session doubles its room
            with first.inference_session(max_length=fed):
                assert torch.equal(generated(first), expected)
                with (
                    second.inference_session(max_length=CACHE_POSITIONS - fed + 1),
                    raises(SwarmTimeout, limit="swarm.timeout_s") as caught,
                ):
                    generated(second)
                assert isinstance(caught.value.last, ServerBusy)
                assert caught.value.last.limit == "max_cache_gb"
                first.remote_blocks.close()  # it vanishes: its session was never given back
            assert torch.equal(generated(second), expected)
        finally:
            second.remote_blocks.close()
