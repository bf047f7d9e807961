"""Experts of all families in 8 and 4 bits: size, numbers and gradients."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant, quantize_4bit
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel

from petals_tune.adapters.base import ExpertParameter
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.experts.stack import ExpertStack, expert_stacks
from petals_tune.blocks.loading import BlockLayout, load_blocks
from petals_tune.blocks.memory import block_bytes
from petals_tune.blocks.quantization import find_scheme
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.families import family_of
from petals_tune.wire.messages import Backward
from petals_tune.wire.span import BlockSpan
from tests.mixtures import EXPERTS, MIXTURES
from tests.models import relative_error
from tests.servers.parts import forward

SPAN = "0:2"
SHARES = {"int8": 0.30, "nf4": 0.18}  # of the weights in float32, at most
FEW = {("gpt_oss", "int8"), ("jetmoe", "nf4")}
EACH = [
    pytest.param(family, quantization, marks=() if (family, quantization) in FEW else pytest.mark.slow)
    for family in MIXTURES
    for quantization in SHARES
]


def engine_of(folder: Path, quantization: str) -> Engine:
    loaded = load_blocks(Checkpoint(str(folder)), BlockSpan.parse(SPAN), quantization=quantization, dtype=torch.float32)
    return Engine(loaded)


def trained(engine: Engine) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The output for some input, a gradient at that input, and the bytes of the graph between."""
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 9, engine.hidden_size, generator=random) * 0.3
    result = engine.forward(forward(SPAN, hidden, keep=True, input_grad=True), None)
    grad = torch.randn(hidden.shape, generator=random)
    gradient, _ = engine.backward(Backward(lease=1, grad=grad), result.graph, None)
    assert gradient is not None
    return result.output, gradient, result.graph_bytes


def there_and_back(matrix: torch.Tensor, quantization: str) -> torch.Tensor:
    """`matrix` (out, in) as bitsandbytes itself quantizes and restores it."""
    if quantization == "int8":
        values, scales, _ = int8_vectorwise_quant(matrix.half().contiguous())
        return values.float() * (scales / 127)[:, None]
    # In rows of 64: on a CPU, bitsandbytes unpacks matrices wrong whose rows are no whole groups.
    groups = matrix.contiguous().view(-1, 64)
    return dequantize_4bit(*quantize_4bit(groups, blocksize=64, quant_type="nf4")).view(matrix.shape)


def save_restored(folder: Path, into: Path, quantization: str) -> Path:
    """The same model with weights that are what quantization leaves of them."""
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        for module in family_of(model).blocks_of(model).modules():
            kind = type(module).__name__
            if type(module) is nn.Linear:
                module.weight.copy_(there_and_back(module.weight, quantization))
            elif "Expert" in kind:
                for name, parameter in module.named_parameters(recurse=False):
                    if not name.endswith("bias"):
                        from_left = kind in ("GptOssExperts", "Llama4TextExperts") or name == "w2"
                        for matrix in parameter.view(EXPERTS, -1, parameter.shape[-1]):
                            rows = matrix.T if from_left else matrix
                            rows.copy_(there_and_back(rows, quantization))
    model.save_pretrained(into)
    return into


@pytest.mark.parametrize(("family", "quantization"), EACH)
def test_quantized_experts_compute_what_the_library_computes_with_their_weights(
    mixture_folder, tmp_path, family, quantization
):
    folder = mixture_folder(family)
    engine = engine_of(folder, quantization)
    plain = engine_of(save_restored(folder, tmp_path / family, quantization), "none")
    output, gradient, graph_bytes = trained(engine)
    wanted, wanted_gradient, plain_bytes = trained(plain)
    assert relative_error(output, wanted) <= 1e-5
    assert relative_error(gradient, wanted_gradient) <= 4e-5  # granitemoeshared: 2e-5, from 3e-6 of its output
    assert graph_bytes <= 1.2 * plain_bytes, "the graph holds no unpacked weights"
    assert engine.loaded.weight_bytes <= SHARES[quantization] * plain.loaded.weight_bytes
    blocks = [BlockLayout.of(Checkpoint(str(folder))).meta_block(number) for number in range(2)]
    estimate = sum(block_bytes(each, quantization=find_scheme(quantization), dtype=torch.float32) for each in blocks)
    assert estimate == pytest.approx(engine.loaded.weight_bytes, rel=0.02)


def test_only_the_experts_that_tokens_chose_are_unpacked(mixture_folder, monkeypatch):
    engine = engine_of(mixture_folder("mixtral"), "int8")
    asked: list[tuple[int, int]] = []
    product = ExpertStack.forward

    def counted(stack: ExpertStack, x: torch.Tensor, expert: int) -> torch.Tensor:
        asked.append((expert, len(x)))
        return product(stack, x, expert)

    monkeypatch.setattr(ExpertStack, "forward", counted)
    engine.forward(forward("0:1", torch.randn(1, 3, engine.hidden_size)), None)
    assert len(asked) == len({*asked}) * 2 <= 2 * 3 * 2, "twice for each expert: into the inner size, and back"
    assert sum(rows for _, rows in asked) == 2 * 3 * 2, "three tokens, two experts each"


@pytest.mark.parametrize("quantization", ["int8", "none"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_is_multiplied_as_families_write_it(transposed, quantization):
    weight = torch.randn(3, 8, 6)
    stack = ExpertStack(ExpertParameter("", (3, 8, 6), transposed, transposed), find_scheme(quantization))
    stack.fill(weight.__getitem__, "cpu")
    x = torch.randn(5, 8 if transposed else 6)
    wanted = x @ weight[2] if transposed else F.linear(x, weight[2])
    matrix = stack[torch.tensor(2)]
    if transposed:
        products = [x.matmul(matrix), torch.matmul(x, matrix), F.linear(x, matrix.T)]
        products.append(torch.bmm(x.expand(3, -1, -1), stack)[2])
    else:
        products = [F.linear(x, matrix), x.matmul(matrix.T), torch.matmul(x, matrix.T)]
    for product in products:
        assert relative_error(product, wanted) <= (1e-6 if quantization == "none" else 0.02)
    for other in (partial(F.linear, x, matrix if transposed else matrix.T), partial(torch.add, x, matrix)):
        with pytest.raises(TypeError):
            other()
    with pytest.raises(TypeError):
        torch.sum(stack)


def test_families_without_experts_have_no_stacks(model_folder):
    loaded = load_blocks(
        Checkpoint(str(model_folder("llama"))), BlockSpan(0, 1), quantization="int8", dtype=torch.float32
    )
    assert not expert_stacks(loaded.model)
