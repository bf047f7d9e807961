"""Training steps that go back with a micro-batch while others go forward, on a swarm in this process."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import ConfigError, RequestRefused
from petals_tune.remote.interleaved import Interleaved
from petals_tune.wire.messages import Backward, Forward, Message
from servers.requests.handler import Handler
from servers.stores.leases import LeaseStore
from tests.inprocess import in_process_swarm
from tests.models import VOCABULARY, plain_model, relative_error, save_model
from tests.remote.test_function import leases, left  # noqa: F401  # a fixture

ROWS, LENGTH = 4, 6
IDS = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "llama", "llama")


def remote(folder: Path, rows: int = 1) -> Any:
    model: Any = AutoDistributedModelForCausalLM.from_pretrained(
        str(folder), initial_peers=["in", "process"], micro_batch_rows=rows
    )
    model.get_input_embeddings().weight.requires_grad_()
    model.get_output_embeddings().weight.requires_grad_()
    return model


def step_of(model: Any, loss_of: Callable[[int, int], torch.Tensor] | None = None) -> torch.Tensor:
    def share(start: int, stop: int) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=IDS[start:stop], labels=IDS[start:stop]).loss
        return loss * ((stop - start) / ROWS)

    step: Interleaved = model.remote_blocks.interleaved(loss_of or share, model.parameters())
    loss = step.run(lambda: model(input_ids=IDS))
    assert loss is not None
    return loss


def gradients(model: Any, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, [model.get_input_embeddings().weight, model.get_output_embeddings().weight])


@pytest.mark.parametrize("rows", [1, 3])
def test_loss_and_gradients_are_those_of_the_whole_batch(folder: Path, rows: int) -> None:
    plain = plain_model(folder).requires_grad_(True)
    expected = plain(input_ids=IDS, labels=IDS).loss
    with in_process_swarm(folder, "0:2", "2:6"):
        model = remote(folder, rows)
        loss = step_of(model)
        found = gradients(model, loss)
        model.remote_blocks.close()
    assert relative_error(loss, expected) < 1e-6
    for own, other in zip(found, gradients(plain, expected), strict=True):
        assert relative_error(own, other) < 1e-5


def test_a_micro_batch_goes_back_while_others_go_forward(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last forward of the first server waits until a backward has been answered."""
    reply, forwards, back = Handler._reply, 0, asyncio.Event()

    async def held(self: Handler, client: str, request: Message) -> Message:
        nonlocal forwards
        if isinstance(request, Forward) and request.span.start == 0:
            forwards += 1
            if forwards == ROWS:
                await asyncio.wait_for(back.wait(), 60)
        answer = await reply(self, client, request)
        if isinstance(request, Backward) and request.lease is not None:
            back.set()
        return answer

    monkeypatch.setattr(Handler, "_reply", held)
    with in_process_swarm(folder, "0:2", "2:6"):
        model = remote(folder)
        step_of(model)
        model.remote_blocks.close()
    assert back.is_set()


def test_losses_are_computed_in_the_order_of_the_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the first one's output comes last."""
    reply, others, done = Handler._reply, 0, asyncio.Event()

    async def first_last(self: Handler, client: str, request: Message) -> Message:
        nonlocal others
        if isinstance(request, Forward) and request.span.start == 2:
            if torch.equal(request.hidden, first):
                await done.wait()
            else:
                others += 1
                if others == ROWS - 1:
                    done.set()
        return await reply(self, client, request)

    order: list[int] = []

    def loss_of(start: int, stop: int) -> torch.Tensor:
        order.append(start)
        loss: torch.Tensor = model(input_ids=IDS[start:stop], labels=IDS[start:stop]).loss
        return loss

    with in_process_swarm(folder, "0:2", "2:6"):
        model = remote(folder)
        first = model.remote_blocks[:2](model.get_input_embeddings()(IDS[:1])).detach()
        monkeypatch.setattr(Handler, "_reply", first_last)
        step_of(model, loss_of)
        model.remote_blocks.close()
    assert done.is_set()
    assert order == list(range(ROWS))


@pytest.mark.parametrize("train", [True, False])
def test_where_servers_take_fewer_rows_it_begins_anew(folder: Path, train: bool) -> None:
    with in_process_swarm(folder, "0:2", "2:6", max_tokens=2 * LENGTH + 1):
        model = remote(folder, ROWS).train(train)
        torch.manual_seed(5)
        loss = step_of(model)
        after = torch.rand(())
        model.remote_blocks.close()
    with in_process_swarm(folder, "0:2", "2:6"):
        model = remote(folder, ROWS).train(train)
        torch.manual_seed(5)
        assert relative_error(loss, step_of(model)) < 1e-6
        assert torch.equal(after, torch.rand(())), "what is drawn later does not depend on the size of micro-batches"
        model.remote_blocks.close()


def test_where_the_loss_fails_leases_go_back_and_the_model_is_as_it_was(
    folder: Path,
    leases: list[LeaseStore],  # noqa: F811
) -> None:
    def failing(start: int, stop: int) -> torch.Tensor:
        if start == 1:
            raise ConfigError("not this one", key="loss")
        loss: torch.Tensor = model(input_ids=IDS[start:stop], labels=IDS[start:stop]).loss
        return loss

    def not_finite(start: int, stop: int) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=IDS[start:stop], labels=IDS[start:stop]).loss
        return loss * torch.nan

    with in_process_swarm(folder, "0:2", "2:6"):
        model = remote(folder)
        expected = model(input_ids=IDS, labels=IDS).loss.detach()
        for loss_of, kind in ((failing, ConfigError), (not_finite, RequestRefused)):
            with pytest.raises(kind):
                step_of(model, loss_of)
            assert leases, "servers kept some"
            assert left(leases) == 0
        assert torch.equal(model(input_ids=IDS, labels=IDS).loss, expected)
        model.remote_blocks.close()


def test_a_model_that_calls_its_blocks_one_by_one_gives_no_loss(folder: Path) -> None:
    with in_process_swarm(folder, "0:6"):
        model = remote(folder)
        step = model.remote_blocks.interleaved(lambda start, stop: torch.zeros(()), model.parameters())
        assert step.run(lambda: model(input_ids=IDS, output_hidden_states=True)) is None
        model.remote_blocks.close()


def test_a_step_is_of_its_own_model(folder: Path) -> None:
    """Another model that the loss calls, such as a reference, runs as ever."""
    with in_process_swarm(folder, "0:6"):
        model, other = remote(folder), remote(folder)
        with torch.no_grad():
            expected = other(input_ids=IDS[:1]).logits

        def loss_of(start: int, stop: int) -> torch.Tensor:
            with torch.no_grad():
                assert relative_error(other(input_ids=IDS[:1]).logits, expected) < 1e-6
            loss: torch.Tensor = model(input_ids=IDS[start:stop], labels=IDS[start:stop]).loss
            return loss

        step_of(model, loss_of)
        model.remote_blocks.close()
        other.remote_blocks.close()
