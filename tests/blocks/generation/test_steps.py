"""Sessions and their caches by direct calls: steps one by one, and steps of several sessions together."""

import pytest
import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.generation.session import Session
from petals_tune.errors import RequestRefused, SessionLost
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Backward
from tests.models import relative_error
from tests.servers.parts import forward, load
from tests.servers.steps import SPAN, hidden, outputs, session, step

TOLERANCE = 1e-5


@pytest.fixture(params=["bloom", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def engine(family: str, model_folder) -> Engine:
    return Engine(load(model_folder(family), str(SPAN)))


def test_one_position_at_a_time_equals_all_at_once(engine):
    whole = hidden(2, 6, 0)
    (expected,) = outputs(engine, (session(2), step(whole, 0)))
    kept = session(2)
    pieces = [outputs(engine, (kept, step(whole[:, at : at + 1], at)))[0] for at in range(6)]
    assert relative_error(torch.cat(pieces, dim=1), expected) < TOLERANCE


@pytest.mark.parametrize("padded", [False, True])
def test_sessions_of_different_lengths_share_a_step(engine, padded):
    """Lengths 3, 7 and 1, the second with two rows, of which one may be padded on the left."""

    def started() -> list[Session]:
        padding = torch.tensor([[False, False, True, True, True, True, True], [True] * 7]) if padded else None
        made = [session(1), session(2), session(1)]
        for number, (each, length) in enumerate(zip(made, (3, 7, 1), strict=True)):
            fields = {"padding": padding} if number == 1 else {}
            outputs(engine, (each, step(hidden(each.rows, length, number), 0, **fields)))
        return made

    together, alone = started(), started()
    for turn in range(3):
        steps = [step(hidden(each.rows, 1, 10 * turn + number), each.position) for number, each in enumerate(together)]
        shared = outputs(engine, *zip(together, steps, strict=True))
        for one, lone_step, found in zip(alone, steps, shared, strict=True):
            (expected,) = outputs(engine, (one, lone_step))
            assert relative_error(found, expected) < TOLERANCE


def test_a_step_that_cannot_be_leaves_the_others_alone(engine):
    good, bad = session(), session()
    for each in (good, bad):
        outputs(engine, (each, step(hidden(1, 2, 0), 0)))
    found, refused = engine.step([(good, step(hidden(1, 1, 1), 2)), (bad, step(hidden(1, 1, 1), 9))])
    assert isinstance(found, torch.Tensor)
    assert isinstance(refused, SessionLost)


def test_rows_are_reordered_and_positions_forgotten(engine):
    text, after = hidden(2, 4, 0), hidden(2, 1, 1)
    kept = session(2)
    outputs(engine, (kept, step(text, 0)))
    outputs(engine, (kept, step(hidden(2, 3, 5), 4)))  # forgotten below
    (found,) = outputs(engine, (kept, step(after, 4, order=torch.tensor([1, 1]))))
    fresh = session(2)
    outputs(engine, (fresh, step(text[[1, 1]], 0)))
    (expected,) = outputs(engine, (fresh, step(after, 4)))
    assert relative_error(found, expected) < TOLERANCE


def test_no_session_grows_beyond_its_length(engine):
    kept = session()
    outputs(engine, (kept, step(hidden(1, 30, 0), 0)))
    (refused,) = engine.step([(kept, step(hidden(1, 3, 0), 30))])
    assert isinstance(refused, RequestRefused)
    assert "max_length=33" in str(refused)
    outputs(engine, (kept, step(hidden(1, 2, 0), 30)))


def test_a_first_step_that_is_shorter_than_a_prompt_is_refused_and_the_session_goes_on(engine):
    prompt = AdapterPart(block=2, method="prompt", tensors=[torch.randn(3, 32)])
    chat = session(adapter=Adapter((prompt,)), version="deep")
    (refused,) = engine.step([(chat, step(hidden(1, 2, 0), 0))])
    assert isinstance(refused, RequestRefused)
    assert "the whole prompt" in str(refused)
    (whole,) = engine.step([(chat, step(hidden(1, 4, 0), 0))])
    assert whole.shape == (1, 4, 32)
    assert chat.position == 4


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_blocks_train_after_they_generated_with_the_same_gradient(family, model_folder, quantization):
    engine = Engine(load(model_folder(family), str(SPAN), quantization))
    request = forward(str(SPAN), hidden(2, 5, 0), keep=True)
    grad = hidden(2, 5, 1)

    def gradient() -> torch.Tensor:
        graph = engine.forward(request, None).graph
        return engine.backward(Backward(lease=1, grad=grad), graph, None)[0]

    before = gradient()
    engine.step([(session(), step(hidden(1, 4, 2), 0))])
    assert torch.equal(gradient(), before)
