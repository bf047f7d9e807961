"""Loads adapters from folders in PEFT's format, trained here or elsewhere, onto local or remote blocks."""

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
                f"{folder} has no {CONFIG_FILE}: it is no adapter; a run leaves its own as outputs/NAME/DATE/adapter",
                key="adapter",
                seen=source,
            )
        return folder
    try:
        found = Path(snapshot_download(str(source), allow_patterns=_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"adapter {source} is neither a folder nor an adapter that the hub gave: {_first_line(error)}",
            key="adapter",
            seen=source,
        ) from None
    if not (found / CONFIG_FILE).is_file():
        raise ConfigError(
            f"{source} on the hub has no {CONFIG_FILE}: it is no adapter in PEFT's format", key="adapter", seen=source
        )
    return found


def saved_config(folder: Path) -> PeftConfig:
    """The PEFT config of an adapter. Raises ConfigError where it cannot be read; see also `check_config`."""
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from None


def base_of(folder: Path) -> str:
    """The model that an adapter was trained on. Raises ConfigError where it does not say."""
    try:
        base = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from None
    if not base:
        raise ConfigError(
            f"the adapter {folder} does not name its base model; add model.source=NAME", key="model.source"
        )
    return str(base)


def load_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
    """`model`, with local or remote blocks, wrapped with the adapter of `folder`, its deep prompts included.

    Raises UnsupportedAdapter where blocks on servers cannot honour it, ConfigError where its tensors are missing,
    damaged, or of another model; no tensor is left as it was silently.
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
            f"the adapter {folder} (of {base}) does not fit this model, or is damaged: {_first_line(error)}",
            key="adapter",
            seen=folder,
        ) from None
    width, hidden_size = getattr(config, "token_dim", None), model.config.get_text_config().hidden_size
    if config.is_prompt_learning and width != hidden_size:  # PEFT takes it, and the first call would fail
        raise ConfigError(
            f"the adapter {folder} (of {base}) is for another model: its soft prompt is {width} wide, and this model's "
            f"embeddings are {hidden_size}",
            key="adapter",
            seen=folder,
        )
    if not config.is_prompt_learning:
        # By their first names: remote blocks stand in a model twice, and PEFT saves and loads them once.
        named = {name for name, _ in net.named_parameters()}
        missing = [name for name in result.missing_keys if net.base_model.prefix in name and name in named]
        if missing or result.unexpected_keys:
            raise ConfigError(
                f"the adapter {folder} (of {base}) is for another model: "
                f"it lacks {missing[:2]} and has {result.unexpected_keys[:2]} beyond this model's",
                key="adapter",
                seen=[*missing, *result.unexpected_keys],
            )
    if (folder / deep_prompt.FILE).exists():
        deep_prompt.load_deep_prompts(model, folder, trainable=trainable)
    # PEFT leaves a soft prompt trainable whatever it is loaded for.
    return net if trainable else net.requires_grad_(False).eval()


def _unreadable(folder: Path, error: BaseException) -> ConfigError:
    file = folder / CONFIG_FILE
    return ConfigError(f"{file} cannot be read: {_first_line(error)}", key="adapter", seen=file)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
