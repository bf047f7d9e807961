"""Adapters as folders in PEFT's format, trained here or anywhere else: onto a model with local or remote blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel, PromptTuningConfig, PromptTuningInit, get_peft_model
from peft.utils import load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from transformers import PreTrainedModel

from petals_tune.errors import ConfigError
from petals_tune.tuning import deep_prompt
from petals_tune.tuning.support import check_config

CONFIG_FILE = "adapter_config.json"
_FILES = ["adapter_*", deep_prompt.FILE, "README.md"]


def adapter_folder(source: str | Path) -> Path:
    """The folder of an adapter: `source` itself, or where the hub's files of that name were put.

    Raises ConfigError where neither has an adapter.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / CONFIG_FILE).is_file():
            raise ConfigError(
                f"{folder} has no {CONFIG_FILE}: it is no adapter; a run leaves its own as outputs/NAME/DATE/adapter"
            )
        return folder
    try:
        found = Path(snapshot_download(str(source), allow_patterns=_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"adapter {source} is neither a folder nor an adapter that the hub gave: {_first_line(error)}"
        ) from None
    if not (found / CONFIG_FILE).is_file():
        raise ConfigError(f"{source} on the hub has no {CONFIG_FILE}: it is no adapter in PEFT's format")
    return found


def saved_config(folder: Path) -> PeftConfig:
    """How an adapter was made. Raises ConfigError where that cannot be read; see also `check_config`."""
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / CONFIG_FILE} cannot be read: {_first_line(error)}") from None


def base_of(folder: Path) -> str:
    """The model that an adapter was trained on. Raises ConfigError where it does not say."""
    try:
        base = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / CONFIG_FILE} cannot be read: {_first_line(error)}") from None
    if not base:
        raise ConfigError(f"the adapter {folder} does not name its base model; add model.source=NAME")
    return str(base)


def load_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
    """`model`, with local or remote blocks, wrapped with the adapter of `folder`, its deep prompts included.

    Raises UnsupportedAdapter where blocks on servers cannot honour it, ConfigError where its tensors are missing,
    damaged, or of another model: nothing is ever left as it was without a word.
    """
    config = saved_config(folder)
    check_config(config)
    base, config.base_model_name_or_path = config.base_model_name_or_path, None  # or PEFT warns of another name
    # Not PeftModel.from_pretrained: it loads soft prompts for use alone, and only warns of tensors that are missing.
    config.inference_mode = not trainable
    if isinstance(config, PromptTuningConfig):
        config.prompt_tuning_init = PromptTuningInit.RANDOM  # a text would need its trainer's tokenizer; values follow
    try:
        net = get_peft_model(model, config)
        result: Any = set_peft_model_state_dict(net, load_peft_weights(str(folder), device="cpu"))
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ConfigError(
            f"the adapter {folder} (of {base}) does not fit this model, or is damaged: {_first_line(error)}"
        ) from None
    width, hidden_size = getattr(config, "token_dim", None), model.config.get_text_config().hidden_size
    if config.is_prompt_learning and width != hidden_size:  # PEFT takes it, and the first call would fail
        raise ConfigError(
            f"the adapter {folder} (of {base}) is for another model: its soft prompt is {width} wide, and this model's "
            f"embeddings are {hidden_size}"
        )
    if not config.is_prompt_learning:
        # By their first names: remote blocks stand in a model twice, and PEFT saves and loads them once.
        named = {name for name, _ in net.named_parameters()}
        missing = [name for name in result.missing_keys if "lora_" in name and name in named]
        if missing or result.unexpected_keys:
            raise ConfigError(
                f"the adapter {folder} (of {base}) is for another model: "
                f"it lacks {missing[:2]} and has {result.unexpected_keys[:2]} beyond this model's"
            )
    if (folder / deep_prompt.FILE).exists():
        deep_prompt.load_deep_prompts(model, folder, trainable=trainable)
    # PEFT leaves a soft prompt trainable whatever it is loaded for.
    return net if trainable else net.requires_grad_(False).eval()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
