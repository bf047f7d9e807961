import pytest
import torch
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from petals_tune.adapters.lora import LoRA
from petals_tune.errors import RequestRefused
from petals_tune.wire.adapter import AdapterPart
from tests.raising import raises

INPUTS, OUTPUTS = 4, 3


def part(*shapes: tuple[int, ...], **fields) -> AdapterPart:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return AdapterPart(block=5, method="lora", module="up", tensors=tensors, **fields)


@pytest.mark.parametrize("linear", [torch.nn.Linear(INPUTS, OUTPUTS), Conv1D(OUTPUTS, INPUTS)], ids=str)
def test_tensors_have_to_fit_the_linear(linear):
    LoRA().check(part((2, INPUTS), (OUTPUTS, 2)), linear, hidden_size=INPUTS)
    for wrong in (
        [],
        [(2, INPUTS)],
        [(2, OUTPUTS), (INPUTS, 2)],
        [(2, INPUTS), (OUTPUTS, 3)],
        [(0, INPUTS), (OUTPUTS, 0)],
        [(INPUTS,), (OUTPUTS, 2)],
    ):
        with raises(RequestRefused, block=5, module="up"):
            LoRA().check(part(*wrong), linear, hidden_size=INPUTS)


def test_the_output_is_the_linears_and_a_scaled_product():
    lora = part((2, INPUTS), (OUTPUTS, 2), scaling=1.5)
    x, output = torch.randn(6, INPUTS), torch.randn(6, OUTPUTS)
    a, b = lora.tensors
    torch.testing.assert_close(
        LoRA().change_output(lora, x, output, training=True), output + 1.5 * x @ (b @ a).T, rtol=1e-5, atol=1e-5
    )


def test_dropout_is_for_training_alone():
    lora = part((2, INPUTS), (OUTPUTS, 2), dropout=0.5)
    x, output = torch.randn(6, INPUTS), torch.zeros(6, OUTPUTS)
    a, b = lora.tensors
    torch.testing.assert_close(LoRA().change_output(lora, x, output, training=False), x @ (b @ a).T)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(LoRA().change_output(lora, x, output, training=True), dropped @ (b @ a).T)
