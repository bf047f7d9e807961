"""What every scheme keeps, and how exact each is."""

import subprocess
import sys

import pytest
import torch

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.quantization import SCHEMES, find_scheme
from petals_tune.errors import ConfigError
from petals_tune.wire.messages import Backward
from tests.models import relative_error
from tests.raising import raises
from tests.servers.parts import BLOOM, SMOLLM2, forward, load


@pytest.mark.parametrize(("quantization", "share"), [("int8", 0.30), ("nf4", 0.17)])
@pytest.mark.parametrize(("family", "sizes"), [("llama", SMOLLM2), ("bloom", BLOOM)], ids=["llama", "bloom"])
def test_quantized_weights_take_a_fraction_of_the_memory(model_folder, family, sizes, quantization, share):
    folder = model_folder(family, **sizes)
    plain, small = load(folder, "0:2"), load(folder, "0:2", quantization)
    assert 0.1 < small.weight_bytes / plain.weight_bytes <= share
    held = {t.data_ptr(): t.untyped_storage().nbytes() for t in [*small.model.parameters(), *small.model.buffers()]}
    assert small.weight_bytes >= sum(held.values()), "nothing is left out of the count"


# Of what the two blocks add to their input. Measured on this model: int8 2.2 %, nf4 25 %.
@pytest.mark.parametrize(("quantization", "bound"), [("int8", 0.04), ("nf4", 0.5)])
def test_quantized_blocks_give_nearly_the_same(model_folder, quantization, bound):
    folder = model_folder("llama", **SMOLLM2)
    hidden = torch.randn(2, 9, 576, generator=torch.Generator().manual_seed(1))
    wanted = Engine(load(folder, "0:2")).forward(forward("0:2", hidden), None).output
    given = Engine(load(folder, "0:2", quantization)).forward(forward("0:2", hidden), None).output
    assert 0 < relative_error(given - hidden, wanted - hidden) < bound


@pytest.mark.parametrize("quantization", sorted(SCHEMES))
def test_a_row_does_not_depend_on_the_rows_beside_it(model_folder, quantization):
    loaded = load(model_folder("llama", **SMOLLM2), "0:2", quantization)
    engine = Engine(loaded)
    rows = torch.randn(3, 9, 576, generator=torch.Generator().manual_seed(1))
    rows[2] *= 30  # an outlier beside it changes how a row would be quantized with the others
    together = engine.forward(forward("0:2", rows), None).output
    alone = torch.cat([engine.forward(forward("0:2", row[None]), None).output for row in rows])
    assert relative_error(together[0], alone[0]) <= 1e-5
    assert relative_error(together, alone) <= 1e-5


@pytest.mark.parametrize("quantization", sorted(SCHEMES))
def test_training_works_and_gives_the_same_after_evaluation(model_folder, quantization):
    engine = Engine(load(model_folder("llama", **SMOLLM2), "0:2", quantization))
    hidden = torch.randn(2, 9, 576, generator=torch.Generator().manual_seed(1))
    grad = torch.randn(2, 9, 576, generator=torch.Generator().manual_seed(2))

    def trained() -> torch.Tensor:
        result = engine.forward(forward("0:2", hidden, keep=True, train=True, seed=5), None)
        gradient, _ = engine.backward(Backward(lease=1, grad=grad), result.graph, None)
        assert gradient is not None
        return gradient

    before = trained()
    evaluated = engine.forward(forward("0:2", hidden), None).output
    engine.forward(forward("0:2", hidden[:, :1]), None)  # as in generation, one token
    assert torch.equal(trained(), before)
    assert torch.equal(engine.forward(forward("0:2", hidden), None).output, evaluated)
    assert torch.isfinite(before).all()
    assert before.abs().max() > 0


def test_a_quantized_gradient_points_where_the_plain_one_does(model_folder):
    folder = model_folder("llama", **SMOLLM2)
    hidden = torch.randn(2, 9, 576, generator=torch.Generator().manual_seed(1))
    gradients = []
    for quantization in ("none", "int8", "nf4"):
        engine = Engine(load(folder, "0:2", quantization))
        result = engine.forward(forward("0:2", hidden, keep=True), None)
        gradient, _ = engine.backward(Backward(lease=1, grad=hidden), result.graph, None)
        gradients.append((gradient - hidden).flatten())  # without the residual stream, which is exact
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.999
    assert torch.cosine_similarity(gradients[0], gradients[2], dim=0) > 0.9


def test_an_unknown_quantization_is_refused_with_those_there_are(model_folder):
    with raises(ConfigError, key="quantization", seen="int4") as caught:
        load(model_folder("llama"), "0:1", "int4")
    assert all(name in str(caught.value) for name in SCHEMES)


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_a_scheme_is_there_on_a_cpu_and_a_gpu(name):
    assert find_scheme(name).name == name
    for device in ("cpu", "cuda", "cuda:1"):
        find_scheme(name).check_available(device)


def test_a_device_that_bitsandbytes_does_not_know_is_refused():
    for name in ("int8", "nf4"):
        with raises(ConfigError, key="quantization", seen=name):
            find_scheme(name).check_available("vulkan")
    find_scheme("none").check_available("vulkan")


def test_the_names_cost_nothing_to_import():
    code = (
        "import sys, petals_tune.blocks.quantization; print({'bitsandbytes', 'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
