"""In which format a tensor goes to a server. Whole steps are in tests/faults/test_mixed.py."""

from __future__ import annotations

import pytest
import torch

from petals_tune.swarm.formats import Formats
from petals_tune.wire.tensors import encoded_bytes
from tests.swarm.played_swarm import record

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}


@pytest.mark.parametrize(("dtype", "size"), DTYPES.items())
def test_auto_is_the_dtype_of_each_server_and_rounds_nothing_else(dtype, size):
    server, tensor = record("a", dtype=dtype), torch.randn(2, 3, 64)
    formats = Formats()
    assert (formats.of_hidden(server), formats.of_grad(server)) == (dtype, dtype)
    for sent in (formats.hidden_for(server, tensor), formats.grad_for(server, tensor)):
        assert encoded_bytes(sent) // tensor.numel() == size
    assert not formats.rounding(server)


def test_a_format_that_is_given_is_that_of_every_server():
    formats = Formats(hidden="bfloat16", grad="blockwise8")
    for dtype in DTYPES:
        server, tensor = record("a", dtype=dtype), torch.randn(2, 3, 64)
        assert (formats.of_hidden(server), formats.of_grad(server)) == ("bfloat16", "blockwise8")
        assert formats.hidden_for(server, tensor).dtype is torch.bfloat16
        assert encoded_bytes(formats.grad_for(server, tensor)) < 1.1 * tensor.numel()
    assert formats.rounding(record("a", dtype="bfloat16")) == {"blockwise8"}, "it computes in the other one"
    assert formats.rounding(record("a", dtype="float32")) == {"bfloat16", "blockwise8"}


def test_a_slow_line_rounds_an_adapters_gradients_whatever_other_formats_are_named():
    formats = Formats(hidden="auto", grad="float32", slow=True)
    assert formats.rounding(record("a", dtype="float32")) == {"float16", "blockwise8"}
    assert formats.rounding(record("a", dtype="bfloat16")) == {"float32", "blockwise8"}
