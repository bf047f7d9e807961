"""(IA)3 on remote blocks equals stock PEFT on the plain model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.adapters.ia3 import IA3
from petals_tune.config import build, check, composed
from petals_tune.errors import RequestRefused, UnsupportedAdapter
from petals_tune.tuning.support import check_config, collect_adapter, tune
from petals_tune.wire.adapter import AdapterPart
from tests.inprocess import in_process_swarm
from tests.models import VOCABULARY, masks, plain_model, relative_error
from tests.raising import raises
from tests.train.tiny import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
TOLERANCE = 1e-5
ROWS, LENGTH = 3, 7
# Outputs of attention, and inputs of the MLP's second linear; then outputs of both.
LINEARS = {
    "bloom": ("query_key_value", "dense_4h_to_h"),
    "llama": ("v_proj", "down_proj"),
    "gpt2": ("c_attn", "mlp.c_proj"),
}


def config(family: str, *, feedforward: bool = True) -> peft.IA3Config:
    attention, mlp = LINEARS[family]
    return peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=[attention, mlp], feedforward_modules=[mlp] if feedforward else []
    )


@pytest.fixture(params=sorted(LINEARS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def models(family: str, model_folder: Callable[..., Path]) -> Iterator[tuple[Any, Any]]:
    """(a model with remote blocks on two servers, the plain model)."""
    folder = model_folder(family)
    with in_process_swarm(folder, "0:2", "2:6"):
        remote = AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=[], micro_batch_rows=2)
        try:
            yield remote, plain_model(folder)
        finally:
            remote.remote_blocks.close()


def tuned(model: Any, family: str, **options: Any) -> peft.PeftModel:
    """With factors that differ from 1, the same for every model."""
    net = tune(model, config(family, **options))
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return net


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = masks(ROWS, LENGTH)["left"]
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("feedforward", [True, False], ids=["inputs and outputs", "outputs"])
def test_loss_logits_and_gradients_are_stock_pefts(models, family, feedforward):
    untouched = models[1](**batch()).logits.detach()
    steps = []
    for model in models:
        net = tuned(model, family, feedforward=feedforward).train()
        output = net(**batch())
        output.loss.backward()
        gradients = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
        steps.append((output.loss, output.logits.detach(), gradients))
    (loss, logits, gradients), (expected_loss, expected_logits, expected) = steps
    real = batch()["attention_mask"].bool()
    assert relative_error(expected_logits[real], untouched[real]) > 0.05, "the factors matter"
    assert relative_error(loss, expected_loss) <= TOLERANCE
    assert relative_error(logits[real], expected_logits[real]) <= TOLERANCE
    assert gradients.keys() == expected.keys()
    assert len(expected) == 2 * 6, "two linears in each of six blocks"
    for name, gradient in expected.items():
        assert relative_error(gradients[name], gradient) <= TOLERANCE, name


def test_a_generation_session_uses_it_at_every_step(models, family):
    ids = batch()["input_ids"]
    options = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    untouched = models[1].generate(input_ids=ids, **options).logits
    given, expected = (tuned(model, family).eval().generate(input_ids=ids, **options) for model in models)
    assert torch.equal(given.sequences, expected.sequences)
    for number in range(4):
        assert relative_error(given.logits[number], expected.logits[number]) <= TOLERANCE
        assert relative_error(given.logits[number], untouched[number]) > 0.05


def test_two_active_adapters_multiply_as_in_peft(models, family):
    logits = []
    for model in models:
        net = tuned(model, family)
        net.add_adapter("more", config(family))
        for name, parameter in net.named_parameters():
            if ".more" in name:
                parameter.data += 0.5
        net.base_model.set_adapter(["default", "more"])
        with torch.no_grad():
            logits.append(net.eval()(**batch()).logits)
    real = batch()["attention_mask"].bool()
    assert relative_error(logits[0][real], logits[1][real]) <= TOLERANCE


def test_what_a_server_would_not_run_is_refused_by_name(models, family):
    remote, _ = models
    net = tune(remote, config(family))
    block = next(iter(remote.remote_blocks.children()))
    layer = next(module for module in block.modules() if IA3().owns(module))
    layer.merged_adapters.append("default")
    with raises(UnsupportedAdapter, seen="merged"):
        collect_adapter([(0, block)])
    layer.merged_adapters.clear()
    with net.disable_adapter():
        assert collect_adapter([(0, block)]) == (None, [])


@pytest.mark.parametrize(
    "shapes", [[], [(3,)], [(1, 3)], [(4, 1)], [(3, 4)], [(1, 4), (3, 1)]], ids=lambda shapes: str(shapes)
)
def test_factors_that_do_not_fit_the_linear_are_refused(shapes):
    part = AdapterPart(block=5, method="ia3", module="up", tensors=[torch.ones(shape) for shape in shapes])
    with raises(RequestRefused, block=5, module="up"):
        IA3().check(part, torch.nn.Linear(4, 3), hidden_size=4)


@pytest.mark.parametrize(("shape", "at_input"), [((1, 4), True), ((3, 1), False)])
def test_the_shape_says_whether_inputs_or_outputs_are_scaled(shape, at_input):
    part = AdapterPart(block=5, method="ia3", module="up", tensors=[torch.ones(shape)])
    IA3().check(part, torch.nn.Linear(4, 3), hidden_size=4)
    assert IA3().is_at_input(part) is at_input


def test_a_run_builds_it_from_the_configuration():
    cfg = composed(["recipe=instruct", "output_dir=out", "tuning=ia3", "tuning.target_modules=[v_proj,down_proj]"])
    check(cfg)
    built = build(cfg.tuning, where="tuning", tokenizer=tiny_tokenizer())
    assert (type(built), built.target_modules) == (peft.IA3Config, {"v_proj", "down_proj"})
    check_config(built)
