"""Which of PEFT's methods remote blocks honour; from its layers on a weightless block to what a server can run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from petals_tune.errors import UnsupportedAdapter
from petals_tune.tuning.deep_prompt import BlockPrompt, DeepPromptConfig, with_deep_prompts
from petals_tune.wire.adapter import AdapterPart, AdapterVersion

# They change what enters the blocks, or the embeddings: tensors that the client has.
_AT_THE_INPUT = frozenset(
    {
        PeftType.PROMPT_TUNING,
        PeftType.MULTITASK_PROMPT_TUNING,
        PeftType.P_TUNING,
        PeftType.CPT,
        PeftType.TRAINABLE_TOKENS,
    }
)

_WORKS = "what works: tuning=lora (peft.LoraConfig), tuning=prompt (peft.PromptTuningConfig), tuning=deep_prompt"


@dataclass(frozen=True)
class _Rule:
    """An option of LoraConfig that remote blocks do not honour."""

    broken: Callable[[LoraConfig], object]
    what: str
    why: str
    instead: str


def _option(name: str, config: LoraConfig) -> object:
    return getattr(config, name, None)  # younger than the oldest PEFT that works


_READS_WEIGHTS = "reads the blocks' weights, which are on the servers"
_RULES = (
    _Rule(lambda c: c.use_dora, "use_dora=True", _READS_WEIGHTS, "use_dora=False, with use_rslora=True or a larger r"),
    _Rule(
        lambda c: c.init_lora_weights not in (True, False, "gaussian"),
        "init_lora_weights={config.init_lora_weights!r}",
        _READS_WEIGHTS,
        'init_lora_weights=true or "gaussian"',
    ),
    _Rule(lambda c: c.bias != "none", "bias={config.bias!r}", "trains biases of the blocks", "bias=none"),
    _Rule(lambda c: c.lora_bias, "lora_bias=True", "puts biases on LoRA's layers", "lora_bias=False"),
    _Rule(
        lambda c: c.layer_replication,
        "layer_replication",
        "makes blocks that no server holds",
        "layer_replication=null",
    ),
    _Rule(
        lambda c: c.target_parameters,
        "target_parameters",
        "names parameters that are no linear's weight, such as fused experts",
        "target_modules with the names of linears",
    ),
    _Rule(lambda c: c.megatron_config, "megatron_config", "is for Megatron's own layers", "megatron_config=null"),
    *(
        _Rule(partial(_option, name), name, "changes what LoRA computes", f"{name} to its default")
        for name in (
            "use_qalora",
            "use_bdlora",
            "velora_config",
            "monteclora_config",
            "kasa_config",
            "arrow_config",
            "alora_invocation_tokens",
        )
    ),
)


def check_config(config: PeftConfig) -> None:
    """Raises UnsupportedAdapter for a method or an option that blocks on servers cannot honour; before PEFT runs.

    What only the model shows, such as `modules_to_save` inside a block, is refused at the first call instead.
    """
    if config.peft_type in _AT_THE_INPUT:
        return
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise UnsupportedAdapter(f"{_name(config)} changes the blocks in a way that servers do not run; {_WORKS}")
    for rule in _RULES:
        if rule.broken(config):
            what = rule.what.format(config=config)
            raise UnsupportedAdapter(f"tuning.{what} {rule.why}; set {rule.instead}")


def tune(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """`model`, with local or remote blocks, wrapped for training as `config` says. Raises as `check_config` does."""
    check_config(config)
    return with_deep_prompts(model, config) if isinstance(config, DeepPromptConfig) else get_peft_model(model, config)


def collect_adapter(blocks: Sequence[tuple[int, nn.Module]]) -> tuple[AdapterVersion | None, list[torch.Tensor]]:
    """The active adapters of `blocks` (pairs of number and module) as (a version of them, their tensors).

    The tensors are the client's own parameters, in the order of the version's parts. Raises UnsupportedAdapter for
    anything on a block that a server would not run: nothing is ever left out without a word.
    """
    parts: list[AdapterPart] = []
    tensors: list[torch.Tensor] = []
    for number, block in blocks:
        for part, parameters in _parts(number, block):
            parts.append(part)
            tensors += parameters
    if not parts:
        return None, []
    return AdapterVersion(version=_digest(parts), parts=tuple(parts)), tensors


def _parts(number: int, block: nn.Module) -> Iterator[tuple[AdapterPart, list[torch.Tensor]]]:
    ours: set[int] = set()  # modules whose parameters are an adapter's
    for path, layer in block.named_modules():
        where = f"block {number}, {path or 'itself'}"
        if id(layer) in ours:
            continue
        if isinstance(layer, AuxiliaryTrainingWrapper):
            raise UnsupportedAdapter(
                f"{where} is trained whole (modules_to_save), and its weights are on the servers; "
                "leave names inside the blocks out of modules_to_save"
            )
        if isinstance(layer, BlockPrompt):
            yield _prompt(number, layer), [layer.prompt]
        elif isinstance(layer, LoraLayer) and isinstance(layer, nn.Module):
            _check_layer(where, layer)
            # Its own children hold the adapter's tensors; the base layer is looked at like any other module.
            ours.update(
                id(m) for name, child in layer.named_children() if name != "base_layer" for m in child.modules()
            )
            yield from _lora(number, path, layer)
        elif isinstance(layer, BaseTunerLayer):
            raise UnsupportedAdapter(f"{where} is a {type(layer).__module__}.{type(layer).__name__}; {_WORKS}")
        else:
            for name, parameter in layer.named_parameters(recurse=False):
                if parameter.requires_grad or (parameter.numel() > 1 and any(parameter.stride())):
                    raise UnsupportedAdapter(
                        f"{where}: {name} has values of its own or is to be trained, and a server would not know of "
                        "it; weights of remote blocks cannot be trained, and LoRA cannot be merged into them"
                    )


def _prompt(number: int, layer: BlockPrompt) -> AdapterPart:
    return AdapterPart(block=number, method="prompt", tensors=[layer.prompt.detach()])


def _lora(number: int, path: str, layer: Any) -> Iterator[tuple[AdapterPart, list[torch.Tensor]]]:
    for name in () if layer.disable_adapters else layer.active_adapters:
        if name not in layer.lora_A:
            continue
        pair = [layer.lora_A[name].weight, layer.lora_B[name].weight]
        part = AdapterPart(
            block=number,
            method="lora",
            module=path,
            scaling=float(layer.scaling[name]),
            dropout=float(getattr(layer.lora_dropout[name], "p", 0.0)),
            tensors=[tensor.detach() for tensor in pair],
        )
        yield part, pair


def _check_layer(where: str, layer: Any) -> None:
    base = layer.get_base_layer()
    if type(layer) is not LoraLinear or not isinstance(base, nn.Linear | Conv1D):
        raise UnsupportedAdapter(
            f"{where} is a {type(base).__name__}; LoRA on remote blocks is for linears: name these in target_modules"
        )
    if layer.merged:
        raise UnsupportedAdapter(
            f"{where}: LoRA was merged, and the block's weights are on the servers; call unmerge_adapter()"
        )
    variants = {name: variant for name, variant in layer.lora_variant.items() if variant is not None}
    if variants:
        raise UnsupportedAdapter(f"{where}: {variants} changes what LoRA computes; {_WORKS}")
    for name, linear in layer.lora_B.items():
        if linear.bias is not None:
            raise UnsupportedAdapter(f"{where}: adapter {name!r} has a bias; set lora_bias=False")


def _digest(parts: Sequence[AdapterPart]) -> str:
    """Names the content: a version that was seen before needs no second upload.

    All bytes are read every time, since a write through `.data` passes by torch's version counters: 2 ms for 3 MB,
    0.3 s for the 128 MB of LoRA r=8 on all of BLOOM-176B.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr((part.block, part.method, part.module, part.scaling, part.dropout)).encode())
        for tensor in part.tensors:
            digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _name(config: PeftConfig) -> str:
    return getattr(config.peft_type, "value", None) or type(config).__name__
