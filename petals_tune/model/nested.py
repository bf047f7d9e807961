"""Text models inside multimodal ones: their config, their module, and which modules images and sound alone need.

A multimodal checkpoint is loaded as the class that transformers' auto classes choose for it, so that an adapter's
tensors have the names that they have in the model that others load. Its towers, such as a vision tower, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_MAPPING,
)

from petals_tune.errors import UnsupportedModel

# In the order in which a text model is looked for: the class that AutoModelForCausalLM gives comes first.
_WITH_HEADS = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config of the text decoder: a part of a multimodal config, else `config` itself."""
    if config.is_encoder_decoder:
        return config
    try:
        return config.get_text_config(decoder=True)
    except ValueError as error:  # several that it could be
        raise UnsupportedModel(
            f"model_type={config.model_type!r}: which part of the model is the text decoder is not known: {error}",
            model_type=config.model_type,
            reason="blocks",
        ) from None


def is_nested(config: PretrainedConfig) -> bool:
    """Is this the config of a multimodal model, with the text decoder's inside?"""
    return text_config(config) is not config


def causal_class(config: PretrainedConfig) -> Any:
    """Return the class with a head that transformers' auto classes load for `config`; None where it has none."""
    return next((found for mapping in _WITH_HEADS if (found := mapping.get(type(config), None)) is not None), None)


def config_for(model_class: Any, config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of `config` that `model_class` is made from, as `AutoModelForCausalLM.from_pretrained` does."""
    nested = text_config(config)
    return nested if not isinstance(config, model_class.config_class) else config


def whole_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build the multimodal model of `config`, towers and all, on the meta device. Raises UnsupportedModel."""
    classes: list[Any] = [mapping.get(type(config), None) for mapping in _WITH_HEADS]
    whole = next((each for each in classes if each is not None and each.config_class is type(config)), None)
    if whole is None:
        raise UnsupportedModel(
            f"model_type={config.model_type!r}: transformers has no language model of this type",
            model_type=config.model_type,
            reason="no class",
        )
    with torch.device("meta"):
        model: PreTrainedModel = whole(config)
        return model


def decoder_path(model: PreTrainedModel) -> str:
    """Return the path of the text decoder without its head inside `model`, such as "model.language_model"."""
    text = text_config(model.config)
    kinds: Any = MODEL_MAPPING.get(type(text), ())
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and type(module.config) is type(text):
            is_base = isinstance(module, kinds) if kinds else module.get_output_embeddings() is None
            if is_base:
                return name
    return model.base_model_prefix if model.base_model is not model else ""


def decoder_of(model: PreTrainedModel) -> Any:
    """Return the text decoder inside `model`, without its head."""
    return model.get_submodule(decoder_path(model))


def towers(model: PreTrainedModel) -> Iterator[str]:
    """Yield the paths of modules beside the text decoder and its head: vision towers, projectors and their like."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings(), getattr(model, "score", None))
    node: nn.Module = model
    above = ""
    path = decoder_path(model)
    for part in path.split(".") if path else ():
        for name, child in node.named_children():
            inside = list(child.modules())
            has_weights = next(child.parameters(), None) is not None
            if name != part and has_weights and not any(end is module for end in ends for module in inside):
                yield f"{above}{name}"
        node, above = node.get_submodule(part), f"{above}{part}."


class _Absent(nn.Module):
    """Replaces a tower, which is not loaded."""

    def __init__(self, path: str, model_type: str):
        super().__init__()
        self.path, self.model_type = path, model_type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedModel(
            f"model_type={self.model_type!r}: text alone would run {self.path}, which is not loaded: of a multimodal "
            "model, the text decoder and its head are",
            model_type=self.model_type,
            reason="tower",
        )


def text_class(model_class: Any, config: PretrainedConfig) -> Any:
    """Derive the class of a multimodal model without its towers; of a text model return `model_class` itself."""
    if not is_nested(config):
        return model_class

    class TextOnly(model_class):
        def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any):
            super().__init__(config, *args, **kwargs)
            for path in list(towers(self)):
                self.set_submodule(path, _Absent(path, config.model_type))

    # transformers finds by these names how a checkpoint's tensors are called.
    TextOnly.__name__, TextOnly.__module__ = model_class.__name__, model_class.__module__
    return TextOnly
