"""Sessions by hand on any slice of blocks give the numbers of the slice's forward, step by step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import ConfigError, RequestRefused
from petals_tune.remote.session import RemoteCache
from petals_tune.wire.messages import OpenSession
from servers.requests.execution import Executor
from tests.inprocess import in_process_swarm
from tests.models import relative_error, save_model
from tests.parity import remote
from tests.raising import raises

TOLERANCE = 1e-5
LENGTH, WIDTH = 9, 32
HIDDEN = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * LENGTH, [0] * 3 + [1] * (LENGTH - 3)])
SLICES = [slice(1, 5), slice(0, 6), slice(2, 3)]
# Layers with a window and without, layers with states beside attention, plain rotary positions, ALiBi.
FAMILIES = [
    "gemma3_text",
    "lfm2",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "bloom", "jamba")),
]


def split(folder: Path, family: str) -> Iterator[Any]:
    """A small model, some blocks at two servers and one between them here."""
    save_model(folder, family)
    with (
        in_process_swarm(folder, "0:2", "3:6"),
        remote(AutoDistributedModelForCausalLM, folder, local_blocks=["2:3"], local_quantization="none") as loaded,
    ):
        yield loaded


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield from split(tmp_path_factory.mktemp("models") / request.param, request.param)


def check(found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor = MASK) -> None:
    real = mask[:, : found.shape[1]].bool()
    assert relative_error(found[real], expected[real]) <= TOLERANCE


def test_steps_of_any_length_on_any_slice(model):
    for blocks in (model.remote_blocks[each] for each in SLICES):
        expected = blocks(HIDDEN)
        with blocks.inference_session(max_length=LENGTH) as session:
            found, reached = [], []
            for part in HIDDEN.split([4, 1, 3, 1], dim=1):
                found.append(session.step(part))
                reached.append(session.position)
            assert reached == [4, 5, 8, 9]
            with raises(RequestRefused, reason="too long", max_length=LENGTH + 1):
                session.step(HIDDEN[:, :1])
        check(torch.cat(found, dim=1), expected, torch.ones_like(MASK))
        assert session.position == 0


def test_a_session_goes_back_and_on_with_other_positions(model):
    blocks = model.remote_blocks[1:5]
    other = torch.cat([HIDDEN[:, :3], HIDDEN[:, 3:].flip(1)], dim=1)
    with blocks.inference_session(max_length=16) as session:
        session.step(HIDDEN)
        session.position = 3
        assert session.position == 3
        check(session.step(other[:, 3:]), blocks(other)[:, 3:], torch.ones(2, LENGTH - 3))
        session.position = 0
        check(session.step(HIDDEN[:1, :5]), blocks(HIDDEN[:1, :5]), torch.ones(1, 5))
        with raises(ConfigError, key="rollback", seen=6):
            session.position = 6


def test_rows_are_chosen_multiplied_and_dropped(model):
    """As in beam search: what each row of now has seen is computed at once for comparison."""
    blocks = model.remote_blocks[1:6]
    with blocks.inference_session(max_length=16) as session:
        session.step(HIDDEN[:, :4])
        beams = torch.tensor([1, 0, 0])
        second = HIDDEN[[0, 1, 1], 4:6]
        session.step(second, hypo_ids=beams)
        last = HIDDEN[[1, 0], 7:]
        found = session.step(last, hypo_ids=torch.tensor([2, 0]))
    seen = torch.cat([HIDDEN[beams][:, :4], second], dim=1)[[2, 0]]
    expected = blocks(torch.cat([seen, last], dim=1))
    assert relative_error(found, expected[:, -last.shape[1] :]) <= TOLERANCE


def test_a_fork_begins_with_what_the_session_holds_and_goes_on_by_itself(model):
    blocks = model.remote_blocks[1:5]
    other = torch.cat([HIDDEN[:, :5], HIDDEN[:, 5:].flip(0)], dim=1)
    with blocks.inference_session(max_length=16) as session:
        session.step(HIDDEN[:, :5])
        with session.fork() as forked:
            assert forked.position == 5
            found = [session.step(HIDDEN[:, 5:7]), forked.step(other[:, 5:7])]
            found += [session.step(HIDDEN[:, 7:]), forked.step(other[:, 7:])]
        for given, parts in ((HIDDEN, found[::2]), (other, found[1::2])):
            assert relative_error(torch.cat(parts, dim=1), blocks(given)[:, 5:]) <= TOLERANCE
        session.position = 3
        assert relative_error(session.step(HIDDEN[:, 3:]), blocks(HIDDEN)[:, 3:]) <= TOLERANCE


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield from split(tmp_path_factory.mktemp("models") / "llama", "llama")


def test_padding_and_positions(llama):
    blocks = llama.remote_blocks[1:5]
    positions = torch.arange(LENGTH) + torch.tensor([[5], [0]])
    with blocks.inference_session(max_length=16) as session:
        parts = [
            session.step(
                HIDDEN[:, start:stop],
                attention_mask=MASK[:, :stop],
                position_ids=positions[:, start:stop],
            )
            for start, stop in ((0, 4), (4, 5), (5, 9))
        ]
        check(torch.cat(parts, dim=1), blocks(HIDDEN, attention_mask=MASK, position_ids=positions))
        session.position = 4
        with raises(ConfigError, key="attention_mask"):
            session.step(HIDDEN[:, 4:5], attention_mask=torch.ones(2, 5))
        with raises(ConfigError, key="attention_mask"):
            session.step(HIDDEN[:, 4:5], attention_mask=torch.ones(2, 1))


def test_adapters_on_these_blocks_count(llama):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    net = peft.get_peft_model(llama, config).eval()
    blocks = llama.remote_blocks[1:5]
    try:
        with blocks.inference_session(max_length=16) as session, torch.no_grad():
            found = torch.cat([session.step(part) for part in HIDDEN.split(4, dim=1)], dim=1)
            check(found, blocks(HIDDEN), torch.ones_like(MASK))
            with net.disable_adapter():
                assert relative_error(found, blocks(HIDDEN)) > 1e-3
                session.position = 4
                with raises(ConfigError, key="past_key_values"):
                    session.step(HIDDEN[:, 4:])
                session.position = 0
                check(session.step(HIDDEN), blocks(HIDDEN), torch.ones_like(MASK))
    finally:
        net.unload()


def test_arguments_that_do_not_fit_are_refused_and_the_session_goes_on(llama):
    blocks = llama.remote_blocks[1:5]
    with blocks.inference_session(max_length=16) as session:
        with raises(ConfigError, key="order"):
            session.step(HIDDEN[:, :4], hypo_ids=torch.tensor([0, 1]))
        session.step(HIDDEN[:, :4])
        with raises(ConfigError, key="past_key_values", seen=1):
            session.step(HIDDEN[:1, 4:])
        for order in ([2, 0], [-1], [], [[0, 1]]):
            with raises(ConfigError, key="order"):
                session.step(HIDDEN[:, 4:], hypo_ids=torch.tensor(order))
        with raises(ConfigError, key="past_key_values", seen=2):
            session.step(HIDDEN[:, 4:], hypo_ids=torch.tensor([1, 0, 0]))
        with raises(ConfigError, key="attention_mask"):
            session.step(HIDDEN[:, 4:], hypo_ids=torch.tensor([1, 0]), attention_mask=MASK)
        with raises(ConfigError, key="use_cache"):
            session.step(HIDDEN[:, 4:].clone().requires_grad_())
        with raises(ConfigError, key="position_ids"):
            session.step(HIDDEN[:, 4:], position_ids=torch.arange(5))
        assert relative_error(session.step(HIDDEN[:, 4:]), blocks(HIDDEN)[:, 4:]) <= TOLERANCE


def test_the_session_of_all_blocks_is_one_of_the_model_too(llama):
    ids = torch.randint(3, 60, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    embeddings = llama.get_input_embeddings()(ids)
    expected = llama(input_ids=ids).logits
    with torch.no_grad(), llama.remote_blocks.inference_session(max_length=16) as session:
        assert isinstance(session, RemoteCache)
        session.step(embeddings[:, :5])
        found = llama(input_ids=ids[:, 5:], past_key_values=session).logits
    torch.testing.assert_close(found, expected[:, 5:], rtol=1e-4, atol=1e-4)
    with torch.no_grad(), llama.remote_blocks[1:5].inference_session() as session, raises(ConfigError):
        llama(input_ids=ids, past_key_values=session)


def test_caches_are_freed_at_the_end_of_the_block_also_after_an_error(llama, monkeypatch):
    opened, kept = [], []
    run = Executor.run

    async def spy(self: Executor, client: str, request: Any) -> Any:
        if isinstance(request, OpenSession):
            opened.append(self)
        return await run(self, client, request)

    monkeypatch.setattr(Executor, "run", spy)

    def fail() -> None:
        with llama.remote_blocks[0:6].inference_session(max_length=16) as session:
            session.step(HIDDEN)
            kept.extend(len(each._stores.sessions) for each in opened)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    llama.remote_blocks(HIDDEN)  # behind the message that frees them, on the same streams
    assert kept == [1, 1]
    assert [len(each._stores.sessions) for each in opened] == [0, 0]


def test_going_back_sends_nothing(llama):
    stats = llama.remote_blocks.stats
    with llama.remote_blocks[3:6].inference_session(max_length=16) as session:
        session.step(HIDDEN)
        calls = stats.calls
        session.position = 4
        assert stats.calls == calls
        session.step(HIDDEN[:, 4:5])
        assert stats.calls == calls + 1, "one server"


def test_equal_rows_are_computed_once_until_they_part(llama, steps):
    blocks = llama.remote_blocks[3:6]
    prompt = HIDDEN[[0, 0, 0, 1]]
    given = torch.cat([prompt[:, :4], prompt[:, 4:5], HIDDEN[[0, 1, 0, 1], 5:6], HIDDEN[[1, 1, 0, 0], 6:7]], dim=1)
    with blocks.inference_session(max_length=16) as session:
        found = [session.step(part) for part in given.split([4, 1, 1, 1], dim=1)]
        assert [rows for rows, _ in steps] == [2, 2, 3, 4]
        session.position = 2
        found.append(session.step(given[:, 2:]))
    assert relative_error(torch.cat(found[:4], dim=1), blocks(given)) <= TOLERANCE
    assert relative_error(found[4], blocks(given)[:, 2:]) <= TOLERANCE
