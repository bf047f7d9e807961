"""What remote blocks cannot honour is refused by name, and nothing that PEFT put on a block is left out unseen."""

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from petals_tune.adapters import METHODS
from petals_tune.errors import UnsupportedAdapter
from petals_tune.remote.skeleton import Skeleton, fill_with_placeholders
from petals_tune.tuning.support import check_config, collect_adapter, is_adapted, refuse_adapter_names
from tests.raising import raises

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = Conv1D(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.table = nn.Embedding(5, WIDTH)


class Model(nn.Module):
    """Two weightless blocks, as a grafted model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Skeleton([Block(), Block()])
        fill_with_placeholders(self.layers, torch.float32)

    def collect(self):
        return collect_adapter(list(enumerate(self.layers)))


def lora(**options) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 2, "target_modules": ["up", "down"], "init_lora_weights": False, **options})


def tuned(**options) -> Model:
    model = Model()
    peft.get_peft_model(model, lora(**options))
    return model


def refused(model: Model, key: str, seen: object = None) -> None:
    with raises(UnsupportedAdapter, key=key, seen=seen):
        model.collect()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [(0, 1)]}, "layer_replication"),
        ({"target_parameters": ["experts.down"], "lora_dropout": 0.1}, "lora_dropout"),
        ({"target_parameters": ["experts.down"], "fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        *(
            ({"init_lora_weights": name}, "init_lora_weights")
            for name in ("pissa", "pissa_niter_4", "olora", "orthogonal", "corda", "eva")
        ),
    ],
)
def test_options_of_lora_that_need_the_weights_or_change_the_blocks_are_refused(options, named):
    with raises(UnsupportedAdapter, key=f"tuning.{named}"):
        check_config(peft.LoraConfig(**{"r": 2, **options}))


@pytest.mark.parametrize(
    "config",
    [
        peft.PrefixTuningConfig(num_virtual_tokens=2),
        peft.AdaLoraConfig(total_step=10),
        peft.LoHaConfig(),
        peft.OFTConfig(),
        peft.VeraConfig(),
    ],
    ids=lambda config: type(config).__name__,
)
def test_methods_that_servers_do_not_run_are_refused_with_what_works_instead(config):
    with raises(UnsupportedAdapter, key="tuning", seen=config.peft_type.value) as caught:
        check_config(config)
    assert all(method.usage in str(caught.value) for method in METHODS.values())


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=2),
        peft.PromptEncoderConfig(num_virtual_tokens=2),
        lora(),
        lora(init_lora_weights="gaussian", use_rslora=True, lora_dropout=0.1, rank_pattern={"up": 4}),
        lora(alpha_pattern={"up": 3}, layers_to_transform=[1], exclude_modules=["down"], fan_in_fan_out=True),
        peft.LoraConfig(target_modules="all-linear"),
        lora(target_parameters=["experts.down"]),
        peft.IA3Config(target_modules=["up"], feedforward_modules=[]),
    ],
)
def test_everything_else_passes(config):
    check_config(config)


def test_parts_say_where_a_tensor_belongs_and_carry_what_peft_computed():
    model = tuned(lora_alpha=3, use_rslora=True, rank_pattern={"down": 4}, lora_dropout=0.25)
    adapter, tensors = model.collect()
    assert [(part.block, part.module) for part in adapter.parts] == [(n, m) for n in (0, 1) for m in ("up", "down")]
    up, down = adapter.parts[:2]
    assert (up.scaling, down.scaling) == (pytest.approx(3 / 2**0.5), pytest.approx(3 / 4**0.5))
    assert up.dropout == 0.25
    assert [tuple(tensor.shape) for tensor in down.tensors] == [(4, 3 * WIDTH), (WIDTH, 4)], "Conv1D keeps (in, out)"
    assert all(tensor.requires_grad for tensor in tensors)
    assert tensors[0] is model.layers[0].up.lora_A["default"].weight


def test_a_version_names_the_content_also_where_it_was_written_past_autograd():
    model = tuned()
    before = model.collect()[0].version
    assert model.collect()[0].version == before
    weight = model.layers[1].down.lora_B["default"].weight
    weight.data[0, 0] += 1e-3
    after = model.collect()[0].version
    assert after != before
    weight.data[0, 0] -= 1e-3
    weight.data.copy_(weight.data)
    assert model.collect()[0].version != after


def test_a_version_says_which_one_of_the_same_tensors_it_replaces():
    model, other = tuned(), tuned()
    first = model.collect()[0]
    assert (first.replaces, model.collect()[0].replaces, other.collect()[0].replaces) == (None, None, None)
    with torch.no_grad():
        model.layers[0].up.lora_A["default"].weight.add_(1)
    second = model.collect()[0]
    assert second.replaces == first.version
    part = collect_adapter(list(enumerate(model.layers))[:1])[0]
    assert part.replaces is None, "of fewer blocks, which begin with the same tensor"
    assert model.collect()[0].replaces is None


def test_a_version_keeps_its_content_while_the_tensors_are_trained():
    model = tuned()
    version = model.collect()[0]
    before = [tensor.clone() for part in version.parts for tensor in part.tensors]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    for tensor, kept in zip((t for part in version.parts for t in part.tensors), before, strict=True):
        assert torch.equal(tensor, kept)


def test_names_choose_adapters_without_what_is_active():
    model = tuned()
    before = model.collect()[0].version
    blocks = list(enumerate(model.layers))
    assert collect_adapter(blocks, ("default",))[0].version == before
    assert collect_adapter(blocks, ()) == (None, [])
    assert collect_adapter(blocks, ("another",)) == (None, [])
    assert is_adapted(model)
    assert not is_adapted(Model())


def test_without_an_adapter_or_with_it_disabled_there_is_nothing():
    assert Model().collect() == (None, [])
    model = Model()
    net = peft.get_peft_model(model, lora())
    with net.disable_adapter():
        assert model.collect() == (None, [])
    assert model.collect()[0] is not None


def test_two_active_adapters_are_both_there():
    model = Model()
    net = peft.get_peft_model(model, lora(target_modules=["up"]))
    net.add_adapter("more", lora(target_modules=["up"], r=3))
    net.base_model.set_adapter(["default", "more"])
    adapter, _ = model.collect()
    assert [tuple(part.tensors[0].shape) for part in adapter.parts] == [(2, WIDTH), (3, WIDTH)] * 2


def test_what_only_the_model_shows_is_refused_at_the_first_call():
    refused(tuned(modules_to_save=["norm"]), "tuning.modules_to_save", "norm")
    refused(tuned(target_modules=["table"]), "tuning.target_modules", "Embedding")
    refused(tuned(use_dora=True), "tuning", "DoraLinearVariant")
    refused(tuned(lora_bias=True), "tuning.lora_bias")


def test_other_tuners_and_trained_or_merged_weights_are_refused_at_the_first_call():
    model = Model()
    peft.get_peft_model(model, peft.LoHaConfig(target_modules=["up"]))
    refused(model, "tuning", "peft.tuners.loha.layer.Linear")

    model = Model()
    model.layers[1].norm.weight.requires_grad_(True)
    refused(model, "tuning", "norm.weight")

    model = Model()
    merged = peft.get_peft_model(model, lora(target_modules=["up"])).merge_and_unload(safe_merge=True)
    refused(merged, "tuning", "up.weight")


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_a_hook_that_would_never_be_called_is_refused_until_it_is_removed(register):
    model = tuned()
    before = model.collect()[0].version
    for module in (model.layers[1], model.layers[1].norm, model.layers[1].up.lora_A["default"]):
        hook = getattr(module, register)(lambda *_: None)
        with raises(UnsupportedAdapter, key="remote_blocks"):
            model.collect()
        hook.remove()
    assert model.collect()[0].version == before


def test_adapter_names_are_refused_and_forgotten():
    model = Model()
    net = peft.get_peft_model(model, lora(target_modules=["1.down"])).eval()
    with raises(UnsupportedAdapter, key="adapter_names"):  # noqa: SIM117
        with net.base_model._enable_peft_forward_hooks(adapter_names=["default", "__base__"]):
            refuse_adapter_names(model, model.layers)
    assert not any(module._forward_pre_hooks for module in net.modules())
    refuse_adapter_names(model, model.layers)
