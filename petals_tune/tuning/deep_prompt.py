"""Deep prompts: trained vectors added to the first positions at the input of every block, beside a soft prompt.

They are `(L, P, H)`, one set for all rows. The soft prompt is PEFT's own and gives the text P positions in front, so
that the first positions of a row are the prompt's, left padding or not.
Source: Petals' `deep_ptune`; Li and Liang 2021, arXiv:2101.00190, for the idea of tuning every layer's first positions.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from petals_tune.adapters.prompt import BlockPrompt
from petals_tune.errors import ConfigError
from petals_tune.files import replacing
from petals_tune.model.families import family_of
from petals_tune.model.nested import decoder_of

FILE = "deep_prompt.safetensors"
_KEY = "prompts"
_NAME = "deep_prompt"  # of the child that each block gets


class DeepPromptConfig(PromptTuningConfig):
    """A soft prompt of `num_virtual_tokens` positions, and deep prompts at the same positions of every block."""


def with_deep_prompts(model: PreTrainedModel, config: DeepPromptConfig) -> PeftModel:
    """`model`, with local or remote blocks, wrapped by PEFT's prompt tuning; deep prompts start at zero.

    PEFT's own `disable_adapter()` leaves out the soft prompt alone.
    """
    net = get_peft_model(model, config)
    blocks = _blocks(model)
    hidden_size = model.config.get_text_config().hidden_size
    _attach(blocks, torch.zeros(len(blocks), config.num_virtual_tokens, hidden_size), adapter=net.active_adapter)
    return net


def deep_prompts(model: PreTrainedModel) -> torch.Tensor | None:
    """The deep prompts (L, P, H) of a model; None where it has none."""
    found = [getattr(block, _NAME) for block in _blocks(model) if hasattr(block, _NAME)]
    return torch.stack([each.prompt.detach() for each in found]) if found else None


def save_deep_prompts(model: PreTrainedModel, folder: Path) -> None:
    """Write `deep_prompt.safetensors`, to lie beside the soft prompt's files."""
    prompts = deep_prompts(model)
    if prompts is None:
        raise ConfigError("this model has no deep prompts to save", key="tuning")
    with replacing(folder / FILE) as partial:
        save_file({_KEY: prompts.contiguous().cpu()}, partial)


def load_deep_prompts(
    model: PreTrainedModel, folder: Path, *, trainable: bool = False, adapter: str = "default"
) -> None:
    """Put the deep prompts of `folder` on the blocks of `model`. Raises ConfigError where they are of another model.

    adapter: PEFT's name of the soft prompt that they are trained with
    """
    try:
        prompts = load_file(folder / FILE)[_KEY]
    except (OSError, SafetensorError, KeyError) as error:
        raise ConfigError(f"{folder / FILE} holds no deep prompts: {error}", seen=folder / FILE) from None
    blocks = _blocks(model)
    hidden_size = model.config.get_text_config().hidden_size
    if prompts.dim() != 3 or (prompts.shape[0], prompts.shape[2]) != (len(blocks), hidden_size):
        raise ConfigError(
            f"{folder / FILE} is for another model: prompts of shape {tuple(prompts.shape)}, and this one has "
            f"{len(blocks)} blocks of width {hidden_size}",
            seen=tuple(prompts.shape),
        )
    _attach(blocks, prompts, trainable=trainable, adapter=adapter)


def _attach(
    blocks: list[nn.Module], prompts: torch.Tensor, *, trainable: bool = True, adapter: str = "default"
) -> None:
    for block, prompt in zip(blocks, prompts, strict=True):
        if hasattr(block, _NAME):
            module = getattr(block, _NAME)
            module.prompt, module.adapter = nn.Parameter(prompt.clone(), requires_grad=trainable), adapter
            continue
        module = BlockPrompt(prompt.clone(), adapter, is_first=block is blocks[0]).requires_grad_(trainable)
        block.add_module(_NAME, module)
        block.register_forward_pre_hook(module.add, with_kwargs=True)


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks themselves; iterating over remote ones would give the remote module instead."""
    remote = getattr(model, "remote_blocks", None)
    if remote is not None:
        return list(remote.children())
    base = decoder_of(model)
    return list(family_of(base).blocks_of(base).children())
