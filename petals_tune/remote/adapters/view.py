"""Views of a model: the same tensors in other module objects, with another adapter on.

PEFT's active adapter is a state of module objects, and so are the methods that its `generate()` replaces for soft
prompts. A call that names an adapter runs on a view of its own: nothing is switched that another thread could see. The
blocks, which are on servers, are the same objects in all views: `RemoteSpan.choice` says which adapters on them count.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from petals_tune.errors import UnsupportedAdapter
from petals_tune.remote.adapters.choice import Choice
from petals_tune.remote.blocks import RemoteSpan

_PATCHED = ("forward", "prepare_inputs_for_generation")  # by PEFT, in objects, while it generates or is disabled


def view_of(net: nn.Module, choice: Choice, *, keep: bool = False) -> Any:
    """Return a view of `net`, a PeftModel or the model itself, in which the adapters of `choice` are on.

    Costs as many small objects as there are modules outside the blocks. `keep`: trainable tensors of the client's part
    are copied, so that the view stays as it is while another thread trains them. Raises UnsupportedAdapter for an
    adapter that is merged into its layer.
    """
    memo: dict[int, nn.Module] = {}
    view = _copied(net, choice, keep, memo)
    for twin in memo.values():
        state = vars(twin)
        for name, value in state.items():
            state[name] = _redirected(value, memo)
    return view


def twin_of(model: Any) -> Any:
    """Return a copy of `model` that can be given adapters of its own; frozen tensors and the connection are shared."""
    shared = (tensor for tensor in model.parameters() if not tensor.requires_grad)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    memo[id(getattr(model, "_active_session", None))] = None  # its caches cannot be copied
    return copy.deepcopy(model, memo)


def _copied(module: nn.Module, choice: Choice, keep: bool, memo: dict[int, nn.Module]) -> nn.Module:
    if id(module) in memo:
        return memo[id(module)]
    twin = memo[id(module)] = type(module).__new__(type(module))
    state = vars(twin)
    state.update(vars(module))  # dicts of parameters and of hooks are shared
    if isinstance(module, RemoteSpan):
        state["choice"] = choice
        return twin
    state["_modules"] = {
        name: None if child is None else _copied(child, choice, keep, memo) for name, child in module._modules.items()
    }
    state["_buffers"] = dict(module._buffers)
    if keep and any(tensor is not None and tensor.requires_grad for tensor in module._parameters.values()):
        state["_parameters"] = {name: _kept(tensor) for name, tensor in module._parameters.items()}
    if isinstance(module, BaseTuner | PeftModel):
        state["active_adapter"] = choice.names[0] if choice.names else []
    if isinstance(module, PeftModel):
        state["_adapters_disabled"] = False
    elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        if getattr(module, "merged_adapters", ()):
            text = (
                "an adapter is merged into a layer outside the blocks: call unmerge_adapter() to choose one in a call"
            )
            raise UnsupportedAdapter(text, key="adapter", seen="merged")
        own = module._get_available_adapters()
        state["_active_adapter"] = [name for name in choice.names if name in own]
        state["_disable_adapters"] = not choice.names
    for name in _PATCHED:
        method = state.get(name)
        if isinstance(method, MethodType) and method.__self__ is not module:
            del state[name]  # PEFT's, for the adapter that is active or disabled now
        elif method is not None and not isinstance(method, MethodType):
            text = f"{type(module).__name__}.{name} was replaced (by accelerate's dispatch?): load the model without it"
            raise UnsupportedAdapter(text, key="adapter", seen=name)
    return twin


def _kept(tensor: nn.Parameter | None) -> nn.Parameter | None:
    if tensor is None or not tensor.requires_grad:
        return tensor
    with torch.no_grad():
        return nn.Parameter(tensor.clone(), requires_grad=False)


def _redirected(value: Any, memo: dict[int, nn.Module]) -> Any:
    """`value` of a module, with views for the modules that it names or is a method of."""
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if isinstance(value, MethodType) and id(value.__self__) in memo:
        return MethodType(value.__func__, memo[id(value.__self__)])
    if type(value) is list and any(isinstance(each, nn.Module) for each in value):
        return [_redirected(each, memo) for each in value]
    return value
