"""Which of PEFT's methods work on remote blocks, and what of them is sent to servers."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from petals_tune.adapters import METHODS
from petals_tune.adapters.prompt import BlockPrompt
from petals_tune.copies import to_host
from petals_tune.errors import UnsupportedAdapter
from petals_tune.tuning.deep_prompt import DeepPromptConfig, with_deep_prompts
from petals_tune.wire.adapter import AdapterPart, AdapterVersion

# Of an adapter's first tensor: the last version of it and of so many tensors with it.
_versions: Any = WeakTensorKeyDictionary()

# Methods that change the embeddings, or what enters block 0: the client has these tensors.
_AT_EMBEDDINGS = frozenset(
    {
        PeftType.PROMPT_TUNING,
        PeftType.MULTITASK_PROMPT_TUNING,
        PeftType.P_TUNING,
        PeftType.CPT,
        PeftType.TRAINABLE_TOKENS,
    }
)

_WORKS = (
    f"what works: {', '.join(method.usage for method in METHODS.values())}, tuning=prompt (peft.PromptTuningConfig)"
)


def check_config(config: PeftConfig) -> None:
    """Raises UnsupportedAdapter for a method or an option that blocks on servers cannot honour; before PEFT runs.

    What only the model shows, such as `modules_to_save` inside a block, is refused at the first call instead.
    """
    if config.peft_type in _AT_EMBEDDINGS:
        return
    method = next((method for method in METHODS.values() if method.peft_type == config.peft_type), None)
    if method is None:
        name = getattr(config.peft_type, "value", None) or type(config).__name__
        raise UnsupportedAdapter(
            f"{name} changes the blocks in a way that servers do not run; {_WORKS}", key="tuning", seen=name
        )
    method.check_config(config)


def tune(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """`model`, with local or remote blocks, wrapped for training as `config` says. Raises as `check_config` does."""
    check_config(config)
    return with_deep_prompts(model, config) if isinstance(config, DeepPromptConfig) else get_peft_model(model, config)


def is_adapted(model: nn.Module) -> bool:
    """Has `model` layers of PEFT's or deep prompts inside? A soft prompt is beside the model, not in it."""
    inside = (BaseTunerLayer, AuxiliaryTrainingWrapper, BlockPrompt)
    return any(isinstance(module, inside) for module in model.modules())


def deep_prompt_owners(model: nn.Module) -> set[str]:
    """Return PEFT's names of the adapters that the deep prompts in `model` belong to."""
    return {module.adapter for module in model.modules() if isinstance(module, BlockPrompt)}


def collect_adapter(
    blocks: Sequence[tuple[int, nn.Module]], names: Sequence[str] | None = None
) -> tuple[AdapterVersion | None, list[torch.Tensor]]:
    """The adapters `names` on `blocks` (pairs of number and module) as (a version of them, their tensors).

    Without `names`, PEFT's active adapters count. The tensors are the client's own parameters, in the order of the
    version's parts. Raises UnsupportedAdapter for anything on a block that a server would not run; nothing is left out
    silently.
    """
    found = [each for number, block in blocks for each in _parts(number, block, names)]
    if not found:
        return None, []
    # Copied before they are digested: another thread may train them in place before they are sent, or sent again.
    copies = iter(to_host(*(_copied(tensor) for part, _ in found for tensor in part.tensors)))
    parts = [msgspec.structs.replace(part, tensors=[next(copies) for _ in part.tensors]) for part, _ in found]
    own = [each for _, parameters in found for each in parameters]
    version = _digest(parts)
    known = _versions.setdefault(own[0], {})
    before, known[len(own)] = known.get(len(own)), version
    replaces = None if before == version else before
    return AdapterVersion(version=version, parts=tuple(parts), replaces=replaces), own


def own_parts(blocks: Sequence[tuple[int, nn.Module]], names: Sequence[str] | None = None) -> list[AdapterPart]:
    """The same adapters, with the client's own parameters as tensors. Raises as `collect_adapter`."""
    return [
        msgspec.structs.replace(part, tensors=parameters)
        for number, block in blocks
        for part, parameters in _parts(number, block, names)
    ]


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory; of a tensor on a GPU, `to_host` makes one anyway."""
    return tensor.clone() if tensor.device.type == "cpu" else tensor


def _parts(
    number: int, block: nn.Module, names: Sequence[str] | None
) -> Iterator[tuple[AdapterPart, list[torch.Tensor]]]:
    ours: set[int] = set()  # modules whose parameters are an adapter's
    for path, layer in block.named_modules():
        where = f"block {number}, {path or 'itself'}"
        _refuse_hooks(layer, where)
        if id(layer) in ours:
            continue
        if isinstance(layer, AuxiliaryTrainingWrapper):
            raise UnsupportedAdapter(
                f"{where} is trained whole (modules_to_save), and its weights are on the servers; "
                "leave names inside the blocks out of modules_to_save",
                key="tuning.modules_to_save",
                seen=path,
            )
        method = next((method for method in METHODS.values() if method.owns(layer)), None)
        if method is not None:
            yield from method.collect(layer, block=number, path=path, names=names)
            # Its own children hold the adapter's tensors; the base layer is looked at like any other module.
            ours.update(
                id(m) for name, child in layer.named_children() if name != "base_layer" for m in child.modules()
            )
        elif isinstance(layer, BaseTunerLayer):
            kind = f"{type(layer).__module__}.{type(layer).__name__}"
            raise UnsupportedAdapter(f"{where} is a {kind}; {_WORKS}", key="tuning", seen=kind)
        else:
            for name, parameter in layer.named_parameters(recurse=False):
                if parameter.requires_grad or (parameter.numel() > 1 and any(parameter.stride())):
                    raise UnsupportedAdapter(
                        f"{where}: {name} has values of its own or is to be trained, and a server would not know of "
                        "it; weights of remote blocks cannot be trained, and adapters cannot be merged into them",
                        key="tuning",
                        seen=f"{path}.{name}",
                    )


def refuse_adapter_names(model: nn.Module, blocks: nn.Module) -> None:
    """Raises UnsupportedAdapter where PEFT was called with `adapter_names`, which it hands to all its layers by hooks.

    PEFT forgets these hooks after an error, so they are removed from all of `model`.
    """
    if not hasattr(model, "peft_config"):  # which PEFT puts there with its layers
        return
    layer = next((module for module in blocks.modules() if isinstance(module, BaseTunerLayer)), None)
    if layer is None or not _with_adapter_names(layer):
        return
    for module in model.modules():
        for key in _with_adapter_names(module):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    raise UnsupportedAdapter(
        "adapter_names: give adapters=[one name, or None, for each row] instead, which also trains and generates",
        key="adapter_names",
    )


def _with_adapter_names(module: nn.Module) -> list[int]:
    return [key for key, hook in module._forward_pre_hooks.items() if "adapter_names" in getattr(hook, "keywords", ())]


def _refuse_hooks(layer: nn.Module, where: str) -> None:
    """Raises UnsupportedAdapter for a hook that is not ours: it would never be called."""
    kinds = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    for hook in itertools.chain.from_iterable(each.values() for each in kinds if each):
        if not str(getattr(hook, "__module__", "")).startswith("petals_tune."):
            raise UnsupportedAdapter(
                f"{where} has a hook, {hook!r}, and would never be called: the block runs on a server; put the hook on "
                "a span, and call the spans one after another: nn.Sequential(remote_blocks[:3], remote_blocks[3:])",
                key="remote_blocks",
                seen=where,
            )


def _digest(parts: Sequence[AdapterPart]) -> str:
    """SHA-256 of the content: a version that a server has seen before is not uploaded again.

    All bytes are read every time, since torch's version counters do not see a write through `.data`: 2 ms for 3 MB,
    0.3 s for the 128 MB of LoRA r=8 on all of BLOOM-176B.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr((part.block, part.method, part.module, part.scaling, part.dropout)).encode())
        for tensor in part.tensors:
            digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
