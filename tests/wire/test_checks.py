"""Tensors that do not fit together cannot be in a message, and are refused from the wire."""

from typing import Any

import msgspec
import pytest
import torch

from petals_tune.errors import ProtocolError
from petals_tune.wire.codec import decode
from petals_tune.wire.messages import Forward, Step
from petals_tune.wire.tensors import to_bytes
from tests.raising import raises
from tests.wire.test_messages import FORWARD, HIDDEN, SPAN


def packed(raw: dict[str, Any]) -> bytes:
    """The bytes of a message, past our own constructors."""
    return msgspec.msgpack.encode(raw, enc_hook=lambda tensor: msgspec.msgpack.Ext(1, to_bytes(tensor)))


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden": torch.ones(3, 4)},
        {"hidden": torch.ones(2, 3, 4, dtype=torch.int64)},
        {"hidden": torch.ones(2, 0, 4)},
        {"padding": torch.ones(2, 3)},
        {"padding": torch.ones(2, 4, dtype=torch.bool)},
        {"positions": torch.arange(3)},
        {"positions": torch.zeros(3, 3, dtype=torch.int64)},
        {"positions": torch.zeros(1, 4, dtype=torch.int64)},
        {"positions": torch.zeros(1, 3)},
        {"positions": torch.tensor([[0, 1, -1]])},
        {"positions": torch.tensor([[0, 1, 2**40]])},
    ],
    ids=lambda fields: "-".join(f"{name}{tuple(tensor.shape)}" for name, tensor in fields.items()),
)
def test_a_forward_whose_tensors_do_not_fit_together_cannot_be_made_and_is_refused_from_the_wire(fields):
    with pytest.raises(ValueError, match=r"not \(|count from 0"):
        Forward(**{"span": SPAN, "hidden": HIDDEN, **fields})
    # The same on the wire, past our own constructor.
    legal = Forward(span=SPAN, hidden=HIDDEN, padding=FORWARD.padding, positions=FORWARD.positions)
    raw = {"kind": "forward", **msgspec.structs.asdict(legal), **fields}
    with raises(ProtocolError, what="message"):
        decode(packed(raw))


LEGAL = Step(session=9, hidden=HIDDEN, position=4, order=torch.tensor([1, 0]))


@pytest.mark.parametrize(
    "fields",
    [
        {"order": torch.tensor([0])},
        {"order": torch.tensor([0, 1, 1])},
        {"order": torch.tensor([[0, 1]])},
        {"order": torch.tensor([0, -1])},
        {"order": torch.tensor([0, 1], dtype=torch.int32)},
        {"position": 0},
        {"position": -1},
    ],
    ids=str,
)
def test_a_step_whose_order_does_not_fit_its_rows_is_refused_from_the_wire(fields):
    with raises(ProtocolError, what="message"):
        decode(packed({"kind": "step", **msgspec.structs.asdict(LEGAL), **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {"position": 0},
        {"position": 65},
        {"order": torch.tensor([0, 0, 0, 0])},
        {"order": torch.tensor([], dtype=torch.int64)},
        {"order": torch.tensor([-1])},
        {"order": torch.tensor([0.0])},
        {"rows": 1},
    ],
    ids=str,
)
def test_a_fork_beyond_its_session_is_refused_from_the_wire(fields):
    fork = {"session": 9, "position": 4, "order": None, **fields}
    raw = {"kind": "open_session", "span": [3, 7], "rows": 3, "max_length": 64}
    decode(packed({**raw, "fork": {"session": 9, "position": 4}}))
    with raises(ProtocolError, what="message"):
        decode(packed({**raw, "fork": fork}))
