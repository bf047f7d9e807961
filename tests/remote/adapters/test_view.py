"""Views of a model: other module objects, the same tensors."""

from types import MethodType

import peft
import pytest
import torch

from petals_tune.errors import UnsupportedAdapter
from petals_tune.remote.adapters.choice import Choice
from petals_tune.remote.adapters.view import view_of
from tests.raising import raises
from tests.remote.adapters.conftest import IDS, METHODS


def test_a_view_has_the_tensors_and_the_blocks_of_the_model_and_nothing_is_switched(saved, shared):
    net = shared.adapters["head"]
    view = view_of(net, Choice(("default",)))
    assert {id(p) for p in view.parameters()} == {id(p) for p in net.parameters()}
    assert view.base_model.model.lm_head is not net.base_model.model.lm_head
    base = view.get_base_model()
    assert base.remote_blocks is base.model.layers
    assert next(base.remote_blocks.children()) is next(net.get_base_model().remote_blocks.children())
    off = view_of(net.get_base_model(), Choice(()))
    assert off.lm_head.disable_adapters
    assert not net.get_base_model().lm_head.disable_adapters
    assert off.remote_blocks.choice == Choice(())
    assert net.get_base_model().remote_blocks.choice is None


def test_a_view_that_keeps_has_copies_of_what_is_trained_here(saved, model):
    net = model.adapters.add("mine", METHODS["head"]())
    view = view_of(net, Choice(("default",)), keep=True)
    before = view.base_model.model.lm_head.modules_to_save["default"].weight.clone()
    with torch.no_grad():
        net.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    assert torch.equal(view.base_model.model.lm_head.modules_to_save["default"].weight, before)
    assert not any(p.requires_grad for n, p in view.named_parameters() if ".layers." not in n)


def test_methods_that_were_replaced_in_an_object_are_those_of_its_view(model):
    """accelerate puts autocast around `forward` so; what PEFT puts there is another object's, and left out."""
    net = peft.get_peft_model(model, METHODS["lora"]())
    seen = []

    def forward(self, *args, **kwargs):
        seen.append(self)
        return type(self).forward(self, *args, **kwargs)

    net.forward = MethodType(forward, net)
    view = view_of(net, Choice(("default",)))
    with torch.no_grad():
        view(input_ids=IDS)
    assert seen == [view]
    net.forward = net.base_model.forward
    assert "forward" not in vars(view_of(net, Choice(("default",))))
    net.forward = lambda *args, **kwargs: None
    with raises(UnsupportedAdapter, key="adapter", seen="forward"):
        view_of(net, Choice(("default",)))


def test_a_merged_layer_is_refused(model):
    net = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    net.merge_adapter()
    with raises(UnsupportedAdapter, key="adapter", seen="merged"):
        model(input_ids=IDS, adapter=None)


@pytest.mark.parametrize("training", [True, False])
def test_a_view_is_in_the_mode_of_its_model(shared, training):
    net = shared.adapters["lora"]
    view = view_of(net.train(training), Choice(("default",)))
    assert (view.training, view.get_base_model().remote_blocks.training) == (training, training)
    net.eval()
