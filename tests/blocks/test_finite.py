"""NaN and Inf in one position of an input are refused, whatever a block does: tensors are scanned as they leave."""

import pytest
import torch

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.graphs import Graph
from petals_tune.errors import NotFinite, RequestRefused
from petals_tune.wire.messages import Backward
from tests.models import FAMILIES, relative_error
from tests.raising import raises
from tests.servers.parts import forward, load
from tests.servers.steps import SPAN, hidden, session, step

BAD = {"NaN": float("nan"), "Inf": float("inf"), "-Inf": float("-inf")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bad_number_anywhere_in_the_input_or_the_gradient_is_refused(model_folder, family):
    """One number in the first, a middle and the last position, in a real or a padded one: of hidden states that are
    run forward, forward again for a backward, and in a session; and of a gradient."""
    engine = Engine(load(model_folder(family), "2:5"))
    padding = torch.ones(2, 6, dtype=torch.bool)
    padding[1, :2] = False
    for bad in BAD.values():
        for row, position in ((0, 0), (1, 3), (0, 5), (1, 0)):
            spoilt = hidden(2, 6, 0)
            spoilt[row, position, 7] = bad
            for keep in (False, True):
                with raises(RequestRefused, block=2, reason="hidden not finite"):
                    engine.forward(forward("2:5", spoilt, padding=padding, keep=keep), None)
            again = forward("2:5", spoilt, padding=padding)
            with raises(RequestRefused, block=2):
                engine.backward(Backward(again=again, grad=hidden(2, 6, 1)), None, None)
            graph = engine.forward(forward("2:5", hidden(2, 6, 0), padding=padding, keep=True), None).graph
            with raises(RequestRefused, reason="gradient not finite"):
                engine.backward(Backward(lease=1, grad=spoilt), graph, None)


@pytest.mark.parametrize("family", ["bloom", "llama", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("order", [None, torch.tensor([0])])
def test_a_bad_step_is_refused_alone_and_its_session_stays_where_it_was(model_folder, family, order):
    engine = Engine(load(model_folder(family), str(SPAN)))
    first, after = hidden(1, 3, 0), hidden(1, 1, 1)

    def started():
        kept = session()
        engine.step([(kept, step(first, 0))])
        return kept

    (expected,) = engine.step([(started(), step(after, 3))])
    for value in BAD.values():
        good, bad = started(), started()
        spoilt = after.clone()
        spoilt[0, 0, 5] = value
        found, refused = engine.step([(good, step(after, 3)), (bad, step(spoilt, 3, order=order))])
        assert relative_error(found, expected) < 1e-5
        assert (type(refused), refused.block) == (RequestRefused, SPAN.start)
        assert good.position == 4
        assert bad.position == (3 if order is None else 0), "rows that were reordered cannot be put back"
        if order is None:
            (found,) = engine.step([(bad, step(after, 3))])
            assert relative_error(found, expected) < 1e-5


def test_a_block_that_makes_bad_numbers_of_good_ones_is_named(model_folder):
    engine = Engine(load(model_folder("llama"), str(SPAN)))
    kept, other = session(), session()
    engine.step([(kept, step(hidden(1, 3, 0), 0))])
    engine.passes.blocks[1].register_forward_hook(lambda module, args, output: output * torch.nan)
    for keep in (False, True):
        with raises(NotFinite, block=2):
            engine.forward(forward(str(SPAN), hidden(2, 3, 0), keep=keep), None)
    (refused,) = engine.step([(kept, step(hidden(1, 1, 0), 3))])
    assert (type(refused), refused.block, kept.position) == (NotFinite, 2, 3)
    (refused,) = engine.step([(other, step(hidden(1, 2, 0), 0))])
    assert (type(refused), refused.block, other.position) == (NotFinite, 2, 0)


def test_what_is_too_large_for_float16_is_named_with_it_and_not_for_others(model_folder):
    large = hidden(2, 3, 0)
    large[1, 2, 5] = 1e5
    for dtype in (torch.float16, torch.bfloat16):
        engine = Engine(load(model_folder("llama"), str(SPAN), dtype=dtype))
        own = session()
        if dtype is torch.float16:
            with raises(NotFinite, block=SPAN.start, dtype="float16"):
                engine.forward(forward(str(SPAN), large), None)
            (refused,) = engine.step([(own, step(large[1:], 0))])
            assert (type(refused), refused.dtype) == (NotFinite, "float16")
        else:
            output = engine.forward(forward(str(SPAN), large), None).output
            assert output.isfinite().all()
            assert float(output[1, 2, 5]) == pytest.approx(1e5, rel=0.01)


def test_bad_gradients_of_a_good_one_are_the_servers_fault(model_folder):
    engine = Engine(load(model_folder("llama"), str(SPAN)))
    graph = engine.forward(forward(str(SPAN), hidden(2, 3, 0), keep=True), None).graph
    graph.output.register_hook(lambda grad: grad * torch.nan)
    with raises(NotFinite, block=None):
        engine.backward(Backward(lease=1, grad=hidden(2, 3, 1)), graph, None)


def test_a_bad_gradient_is_refused_where_an_adapters_gradient_does_not_show_it(model_folder):
    """A kernel may skip what is masked: the gradient of the first position's prompt misses the second position."""
    engine = Engine(load(model_folder("llama"), str(SPAN)))
    prompt = torch.ones(1, 1, 32, requires_grad=True)
    graph = Graph(output=torch.cat([prompt, torch.ones(1, 1, 32)], dim=1), hidden=None, adapter=[prompt])
    grad = hidden(1, 2, 1)
    grad[0, 1, 0] = torch.nan
    with raises(RequestRefused, reason="gradient not finite"):
        engine.backward(Backward(lease=1, grad=grad), graph, None)


def test_a_forward_scans_once_where_all_is_well(model_folder, monkeypatch):
    engine = Engine(load(model_folder("llama"), str(SPAN)))
    scanned: list[int] = []
    isfinite = torch.Tensor.isfinite
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda tensor: scanned.append(tensor.numel()) or isfinite(tensor))
    engine.forward(forward(str(SPAN), hidden(2, 3, 0)), None)
    assert scanned == [2 * 3 * 32]
    for _ in range(2):  # at its first step, an engine tries what its blocks keep
        scanned.clear()
        engine.step([(session(), step(hidden(1, 1, 0), 0)), (session(), step(hidden(1, 1, 0), 0))])
    assert scanned == [2 * 32]
