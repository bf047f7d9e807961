"""LoRA on experts against PEFT's own on the plain model, for the layouts that families have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import peft
import pytest
import torch
from torch import nn
from transformers import AutoModel

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.adapters.base import ExpertShape, expert_parameters
from petals_tune.adapters.expert_lora import ExpertLoRA
from petals_tune.blocks.adapters import MAX_PARTS_A_MODULE, Adapter
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.loading import load_blocks
from petals_tune.errors import RequestRefused, UnsupportedAdapter
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.families import family_of
from petals_tune.tuning.saved import load_adapter
from petals_tune.tuning.support import tune
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Backward
from petals_tune.wire.span import BlockSpan
from tests.inprocess import in_process_swarm
from tests.mixtures import EXPERTS
from tests.models import plain_model, relative_error
from tests.parity import remote
from tests.raising import raises
from tests.servers.parts import forward

LAYOUTS = {  # where experts are, of a family for each layout of their parameters
    "qwen3_moe": ("mlp.experts", "gate_up_proj", "down_proj"),
    "gpt_oss": ("mlp.experts", "gate_up_proj", "down_proj"),  # (E, in, out), which the module says
    "llama4_text": ("feed_forward.experts", "gate_up_proj", "down_proj"),  # the same, which PEFT does not know
    "jetmoe": ("mlp.input_linear", "weight"),
}


def with_lora(folder: Any, family: str, **options: Any) -> Any:
    """The plain model with stock PEFT's LoRA on its experts and none of its numbers zero."""
    torch.manual_seed(0)
    module, *names = LAYOUTS[family]
    config = peft.LoraConfig(
        **{
            "r": 2,
            "target_modules": [],
            "target_parameters": [f"{module}.{name}" for name in names],
            "init_lora_weights": False,
            **options,
        }
    )
    return peft.get_peft_model(AutoModel.from_pretrained(folder), config)


def collected(net: Any) -> Iterator[tuple[AdapterPart, list[torch.Tensor]]]:
    plain = net.get_base_model()
    for number, block in enumerate(family_of(plain).blocks_of(plain)):
        for path, layer in block.named_modules():
            if ExpertLoRA().owns(layer):
                yield from ExpertLoRA().collect(layer, block=number, path=path, names=None)


@pytest.mark.parametrize("family", LAYOUTS)
def test_outputs_and_gradients_are_those_of_peft(mixture_folder, family):
    folder = mixture_folder(family)
    net = with_lora(folder, family, use_rslora=True)
    engine = Engine(load_blocks(Checkpoint(str(folder)), BlockSpan(0, 2), quantization="none", dtype=torch.float32))
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 9, engine.hidden_size, generator=random) * 0.3
    plain = net.get_base_model()
    wanted = plain(inputs_embeds=hidden, use_cache=False).last_hidden_state
    grad = torch.randn(hidden.shape, generator=random)
    parts, parameters = zip(*collected(net), strict=True)
    parameters = [each for pair in parameters for each in pair]
    wanted_gradients = torch.autograd.grad(wanted, parameters, grad)

    leaves = [
        msgspec.structs.replace(part, tensors=[tensor.clone().requires_grad_() for tensor in part.tensors])
        for part in parts
    ]
    assert {part.module for part in parts} == {f"{LAYOUTS[family][0]}.{name}" for name in LAYOUTS[family][1:]}
    adapter = Adapter(tuple(engine.prepare_adapter(leaves)))
    result = engine.forward(forward("0:2", hidden, keep=True, input_grad=False), adapter)
    at_output = result.output.clone().requires_grad_()
    normed = plain.norm(at_output)
    assert relative_error(normed, wanted) <= 1e-5
    (grad_at_output,) = torch.autograd.grad(normed, at_output, grad)
    _, gradients = engine.backward(Backward(lease=1, grad=grad_at_output), result.graph, adapter)
    for mine, its in zip(gradients, wanted_gradients, strict=True):
        assert its.any()
        assert relative_error(mine, its) <= 1e-5
    with net.disable_adapter():
        assert not list(collected(net))
        without = plain(inputs_embeds=hidden, use_cache=False).last_hidden_state
    assert relative_error(without, wanted) > 1e-2, "LoRA did something"
    bare = engine.forward(forward("0:2", hidden), None).output
    assert relative_error(plain.norm(bare), without) <= 1e-5, "nothing is left of the adapter"


class Stack(nn.Module):
    for_adapters = ExpertShape(experts=3, inputs=4, outputs=5, swapped=False)


def part(*shapes: tuple[int, ...], **fields: Any) -> AdapterPart:
    tensors = [torch.ones(shape) for shape in shapes]
    return AdapterPart(block=5, method="expert_lora", module="up", tensors=tensors, **fields)


def test_tensors_have_to_fit_the_experts():
    method = ExpertLoRA()
    method.check(part((6, 4), (5, 6)), Stack(), 4)
    for wrong in ([], [(6, 4)], [(6, 5), (4, 6)], [(6, 4), (5, 3)], [(5, 4), (5, 5)], [(0, 4), (5, 0)], [(6,), (5, 6)]):
        with raises(RequestRefused, block=5, module="up"):
            method.check(part(*wrong), Stack(), 4)
    with raises(RequestRefused, block=5, module="up"):
        method.check(part((6, 4), (5, 6), dropout=0.1), Stack(), 4)
    with raises(RequestRefused, block=5, module="up"):
        method.check(part((6, 4), (5, 6)), nn.Linear(4, 5), 4)


def test_as_many_parts_on_experts_as_on_a_linear(mixture_folder):
    folder = mixture_folder("gpt_oss")
    engine = Engine(load_blocks(Checkpoint(str(folder)), BlockSpan(0, 1), quantization="int8", dtype=torch.float32))
    one = AdapterPart(
        block=0,
        method="expert_lora",
        module="mlp.experts.down_proj",
        tensors=[torch.ones(EXPERTS, 128), torch.ones(128, EXPERTS)],
    )
    engine.hooks.check([one] * MAX_PARTS_A_MODULE, engine.hidden_size)
    for refused in (
        [one] * (MAX_PARTS_A_MODULE + 1),
        [msgspec.structs.replace(one, module="mlp.experts")],
        [msgspec.structs.replace(one, method="lora")],
        [msgspec.structs.replace(one, method="ia3", tensors=[torch.ones(128, 1)])],
    ):
        with raises(RequestRefused, reason="adapter", block=0):
            engine.hooks.check(refused, engine.hidden_size)


def test_parameters_that_are_no_experts_are_refused(mixture_folder):
    net = with_lora(mixture_folder("qwen3_moe"), "qwen3_moe", target_parameters=["q_proj.weight"])
    with raises(UnsupportedAdapter, key="tuning.target_parameters", seen="weight"):
        list(collected(net))
    config = {each.name for module in net.modules() for each in expert_parameters(module)}
    assert config == {"gate_up_proj", "down_proj"}


def test_a_merged_adapter_is_refused(mixture_folder):
    net = with_lora(mixture_folder("qwen3_moe"), "qwen3_moe")
    net.merge_adapter()
    with raises(UnsupportedAdapter, key="tuning", seen="merged"):
        list(collected(net))


def test_an_adapter_goes_to_stock_peft_and_back(model_folder, tmp_path):
    folder = model_folder("qwen3_moe")
    ids = torch.arange(3, 21).reshape(2, 9)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False,
    )
    with in_process_swarm(folder, "0:2", "2:6"):
        with remote(AutoDistributedModelForCausalLM, folder) as model, torch.no_grad():
            net = tune(model, config).eval()
            wanted = net(input_ids=ids).logits
            net.save_pretrained(tmp_path)
        with remote(AutoDistributedModelForCausalLM, folder) as model, torch.no_grad():
            bare = model(input_ids=ids).logits
            again = load_adapter(model, tmp_path)(input_ids=ids).logits
    with torch.no_grad():
        stock = peft.PeftModel.from_pretrained(plain_model(folder), tmp_path)
        assert relative_error(stock(input_ids=ids).logits, wanted) <= 1e-5
    assert torch.equal(again, wanted)
    assert relative_error(bare, wanted) > 1e-2
