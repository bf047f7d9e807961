"""Loads adapters from folders in PEFT's format, trained here or elsewhere, onto local or remote blocks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel, PromptTuningConfig, PromptTuningInit, get_peft_model
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from petals_tune.checksums import SUMS, check_sums
from petals_tune.errors import ConfigError
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.fingerprint import Fingerprint
from petals_tune.tuning import deep_prompt, identity
from petals_tune.tuning.identity import Identity, check_base, check_labels, check_task
from petals_tune.tuning.support import check_config

CONFIG_FILE = "adapter_config.json"
_TOKENIZER = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*"]
_FILES = ["adapter_*", deep_prompt.FILE, identity.FILE, SUMS, "README.md", *_TOKENIZER]
_HEADS = ("score", "classifier")  # PEFT's names of classification heads


def adapter_folder(source: str | Path) -> Path:
    """The folder of an adapter: `source` itself, or where the hub's files of that name were put.

    Raises ConfigError where neither has an adapter, or a file differs from its checksum.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / CONFIG_FILE).is_file():
            inside = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_FILE}"))
            hint = (
                f"name one of the adapters inside it: {', '.join(inside)}"
                if inside
                else "a run leaves its own as outputs/NAME/DATE/adapter"
            )
            raise ConfigError(
                f"{folder} has no {CONFIG_FILE}: it is no adapter; {hint}",
                key="adapter",
                seen=source,
            )
        check_sums(folder, key="adapter")
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
    check_sums(found, key="adapter")
    return found


def saved_config(folder: Path) -> PeftConfig:
    """The PEFT config of an adapter. Raises ConfigError where it cannot be read; see also `check_config`."""
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from None


def base_of(folder: Path) -> str:
    """The model that an adapter was trained on, as `model.source` takes it. Raises ConfigError where it is not said."""
    if found := Identity.read(folder):
        return found.source
    if base := _saved_options(folder).get("base_model_name_or_path"):
        return str(base)
    raise ConfigError(f"the adapter {folder} does not name its base model; add model.source=NAME", key="model.source")


def choose_base(folder: Path, *, source: str | None, revision: str | None) -> tuple[str, str | None]:
    """Return a base model for an adapter and its revision on the hub: those that are given, else the adapter's own.

    A `source` without a revision means its main branch. Raises ConfigError where neither names a model.
    """
    if source is not None:
        return source, revision
    found = Identity.read(folder)
    own = _saved_options(folder).get("revision") if found is None else found.revision
    return base_of(folder), revision or own


def check_adapter(
    folder: Path,
    *,
    task: str,
    source: str,
    named: str,
    revision: str | None = None,
    labels: tuple[str, ...] | None = None,
) -> Identity | None:
    """Check that an adapter is one for `task` (PEFT's name) on the model `source`; return its identity, if it has one.

    Reads no more of the model than its fingerprint takes. `named` is the model in error messages; `labels` are the
    label words of a run that classifies, None where there are none to compare. Raises ConfigError.
    """
    config = saved_config(folder)
    check_task(folder, saved=config.task_type, wanted=task)
    if (folder / deep_prompt.FILE).exists() and not config.is_prompt_learning:
        raise ConfigError(
            f"{folder} has both {deep_prompt.FILE} and an adapter of another method: remove the one that is not meant",
            key="adapter",
            seen=folder,
        )
    found = Identity.read(folder)
    if found is not None:
        check_base(folder, found, Fingerprint.of(source, revision), named=named)
    if task == "SEQ_CLS" and labels is not None:
        check_labels(folder, saved=found.labels if found else (), wanted=labels)
        if (rows := head_rows(folder)) != len(labels):
            raise ConfigError(
                f"the adapter {folder} has a head of {rows} labels, and this run has {len(labels)}: {list(labels)}",
                key="objective.words",
                seen=rows,
            )
    if config.is_prompt_learning:
        _check_width(folder, config, Checkpoint(source, revision=revision).config.get_text_config().hidden_size)
    return found


def head_rows(folder: Path) -> int:
    """Return the number of labels of an adapter's classification head. Raises ConfigError where it has none."""
    for name, tensor in _read_weights(folder).items():
        if name.endswith(tuple(f"{head}.weight" for head in _HEADS)):
            return tensor.shape[0]
    raise ConfigError(
        f"the adapter {folder} is of a classifier, and its head is not in it: it was not saved, and cannot be guessed",
        key="adapter",
        seen=folder,
    )


def load_tokenizer(source: str, adapter: Path | None, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer in the adapter's folder, where one is (of a resized vocabulary, say), else the model's.

    Raises ConfigError where there is none, or it cannot be read.
    """
    own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    place, options = (str(adapter), {}) if own else (source, {"revision": revision})
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{place} has no tokenizer that can be loaded: {_first_line(error)}", key="model.source", seen=place
        ) from None


def load_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
    """`model`, with local or remote blocks, wrapped with the adapter of `folder`, its deep prompts included.

    Raises UnsupportedAdapter where blocks on servers cannot honour it, ConfigError where its tensors are missing,
    damaged, or of another model; no tensor is left as it was silently.
    """
    check_config(saved_config(folder))
    net = wrap_with_adapter(model, folder, trainable=trainable)
    if (folder / deep_prompt.FILE).exists():
        deep_prompt.load_deep_prompts(model, folder, trainable=trainable)
    # PEFT leaves a soft prompt trainable whatever it is loaded for.
    return net if trainable else net.requires_grad_(False).eval()


def wrap_with_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
    """`model` wrapped by PEFT, with all tensors of the adapter; the vocabulary is resized to the adapter's.

    Raises ConfigError where tensors are missing, damaged, of another model, or would be left out.
    """
    config = saved_config(folder)
    base, config.base_model_name_or_path = config.base_model_name_or_path, None  # or PEFT warns of another name
    # Not PeftModel.from_pretrained: it loads soft prompts for use alone, and only warns of tensors that are missing.
    config.inference_mode = not trainable
    if isinstance(config, PromptTuningConfig):
        config.prompt_tuning_init = PromptTuningInit.RANDOM  # a text would need its trainer's tokenizer; values follow
    weights = _read_weights(folder)
    _resize_vocabulary(model, weights)
    try:
        net = get_peft_model(model, config)
        result: Any = set_peft_model_state_dict(net, dict(weights))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _unfit(folder, base, error) from None
    if config.is_prompt_learning:
        _check_width(folder, config, model.config.get_text_config().hidden_size)  # PEFT takes any
        expected = get_peft_model_state_dict(net, save_embedding_layers=False).keys()
        missing, unexpected = sorted(expected - weights.keys()), sorted(weights.keys() - expected)
    else:
        # By their first names: remote blocks stand in a model twice, and PEFT saves and loads them once.
        named = {name for name, _ in net.named_parameters()}
        adapted = (net.base_model.prefix, "modules_to_save", "trainable_tokens_delta")
        missing = [name for name in result.missing_keys if name in named and any(part in name for part in adapted)]
        unexpected = result.unexpected_keys
    if missing or unexpected:
        raise ConfigError(
            f"the adapter {folder} (of {base}) is for another model: "
            f"it lacks {missing[:2]} and has {unexpected[:2]} beyond this model's",
            key="adapter",
            seen=[*missing, *unexpected],
        )
    return net


def saved_vocabulary(folder: Path) -> int | None:
    """The number of token embeddings that an adapter brings along; None where it keeps the model's."""
    embeddings = re.compile(r"\.(embed_tokens|word_embeddings|wte|embed_in)(\.base_layer)?\.weight$")
    sizes = [tensor.shape[0] for name, tensor in _read_weights(folder).items() if embeddings.search(name)]
    return max(sizes, default=None)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the adapter's tensors. Raises ConfigError where they are absent or damaged."""
    try:
        weights: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ConfigError(
            f"the tensors of the adapter {folder} cannot be read: {_first_line(error)}", key="adapter", seen=folder
        ) from None
    # With a resized vocabulary PEFT writes trained embeddings twice, and reads the shorter name.
    twice = {name for name in weights if (short := name.replace(".modules_to_save.", ".")) != name and short in weights}
    return {name: tensor for name, tensor in weights.items() if name not in twice}


def _resize_vocabulary(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Resize the embeddings and head of `model`, where the adapter brings its own with other numbers of rows."""
    embeddings = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module}
    names = [name for name, module in model.named_modules() if id(module) in embeddings]
    stored = (f"base_model.model.{name}.{inner}weight" for name in names for inner in ("", "base_layer."))
    rows = {weights[name].shape[0] for name in stored if name in weights}
    current: Any = model.get_input_embeddings().weight
    if len(rows) == 1 and rows != {current.shape[0]}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)


def _check_width(folder: Path, config: PeftConfig, hidden_size: int) -> None:
    width = getattr(config, "token_dim", None)
    if width != hidden_size:
        raise ConfigError(
            f"the adapter {folder} (of {config.base_model_name_or_path}) is for another model: its soft prompt is "
            f"{width} wide, and this model's embeddings are {hidden_size}",
            key="adapter",
            seen=folder,
        )


def _unfit(folder: Path, base: str | None, error: BaseException) -> ConfigError:
    return ConfigError(
        f"the adapter {folder} (of {base}) does not fit this model, or is damaged: {_first_line(error)}",
        key="adapter",
        seen=folder,
    )


def _saved_options(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises ConfigError."""
    try:
        options: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from None
    return options


def _unreadable(folder: Path, error: BaseException) -> ConfigError:
    file = folder / CONFIG_FILE
    return ConfigError(f"{file} cannot be read: {_first_line(error)}", key="adapter", seen=file)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
