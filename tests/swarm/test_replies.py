import pytest
import torch

from petals_tune.errors import BadReply, ConfigError, NotFinite
from petals_tune.swarm.replies import check_tensor, expect, gradients_by_block
from petals_tune.swarm.routes.route import Hop
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Done, Pong
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan
from tests.raising import raises

SPAN = BlockSpan(2, 4)
HOP = Hop(
    ServerRecord(
        peer="a",
        addresses=(),
        model="m",
        model_name="tiny",
        blocks=SPAN,
        total_blocks=6,
        quantization="none",
        dtype="float32",
    ),
    SPAN,
)
LIKE = torch.zeros(2, 3, 4, dtype=torch.bfloat16)


def test_a_reply_has_to_be_of_the_class_that_was_asked_for():
    assert expect(HOP, Done(), Done) == Done()
    with raises(BadReply, peer="a"):
        expect(HOP, Pong(), Done)


def test_a_tensor_comes_back_in_the_dtype_of_the_one_that_was_sent():
    checked = check_tensor(HOP, torch.full((2, 3, 4), 0.5), LIKE)
    assert checked.dtype is torch.bfloat16
    assert (checked == 0.5).all()


@pytest.mark.parametrize("tensor", [torch.zeros(2, 3, 5), torch.zeros(2, 3), torch.zeros(2, 3, 4, dtype=torch.int64)])
def test_another_shape_or_whole_numbers_are_a_bad_reply(tensor):
    with raises(BadReply, peer="a"):
        check_tensor(HOP, tensor, LIKE)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_told_apart(value):
    tensor = torch.zeros(2, 3, 4)
    tensor[1, 2, 3] = value
    with raises(NotFinite, peer="a"):
        check_tensor(HOP, tensor, LIKE)


def test_numbers_that_the_client_cannot_hold_are_no_servers_fault():
    with raises(ConfigError, key="dtype", seen="torch.float16"):
        check_tensor(HOP, torch.full((2, 3, 4), 1e5), LIKE.half())
    assert check_tensor(HOP, torch.full((2, 3, 4), 1e5), LIKE.float()).max() == 1e5


def part(block: int) -> AdapterPart:
    return AdapterPart(block=block, method="lora", module="q", tensors=[torch.zeros(2, 4), torch.zeros(4, 2)])


def test_gradients_of_an_adapter_are_sorted_to_its_blocks():
    sent = [torch.full(shape, float(number)) for number, shape in enumerate([(2, 4), (4, 2)] * 3)]
    by_block = gradients_by_block(HOP, [part(2), part(2), part(3)], sent)
    assert {block: [int(each[0, 0]) for each in found] for block, found in by_block.items()} == {
        2: [0, 1, 2, 3],
        3: [4, 5],
    }


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_or_too_many_gradients_are_a_bad_reply(count):
    with raises(BadReply, peer="a"):
        gradients_by_block(HOP, [part(2)], [torch.zeros(2, 4)] * count)
