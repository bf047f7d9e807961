from typing import Any

import msgspec
import pytest
import torch

from petals_tune.errors import ProtocolError
from petals_tune.wire.adapter import AdapterPart, AdapterVersion
from petals_tune.wire.codec import decode, encode
from petals_tune.wire.messages import PutAdapter
from petals_tune.wire.span import BlockSpan
from tests.raising import raises


def part(**fields: Any) -> AdapterPart:
    return AdapterPart(**{"block": 1, "method": "lora", "module": "mlp", "tensors": [torch.zeros(1, 2)] * 2, **fields})


def test_a_server_is_sent_the_parts_on_its_blocks_in_their_order():
    parts = tuple(part(block=block, module=module) for block in range(4) for module in ("k", "q"))
    version = AdapterVersion(version="v", parts=parts)
    assert version.on(BlockSpan(1, 3)) == list(parts[2:6])
    assert version.on(BlockSpan(4, 6)) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"tensors": [torch.zeros(1, 2)] * 3},
        {"method": "m" * 33},
        {"module": "m" * 257},
        {"dropout": -0.1},
        {"dropout": 1.1},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_part_beyond_its_limits_is_refused_from_the_wire(fields):
    span = BlockSpan(0, 4)
    assert decode(encode(PutAdapter(version="v", span=span, parts=[part()]))).span == span
    with raises(ProtocolError, what="message"):
        decode(encode(PutAdapter(version="v", span=span, parts=[msgspec.structs.replace(part(), **fields)])))
