"""Merge a LoRA adapter into a whole local model: python -m petals_tune.merge adapter=FOLDER output=NEW_FOLDER"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import hydra
from omegaconf import DictConfig

from petals_tune.cli import quiet_libraries, report_errors
from petals_tune.config import TunedModel, check_arguments, folder_of
from petals_tune.errors import ConfigError, UnsupportedAdapter, UnsupportedModel
from petals_tune.files import filling

CONFIG_NAME = "merge"


@dataclass(frozen=True, kw_only=True)
class Merge:
    """All options of a merge; conf/merge.yaml documents them."""

    adapter: str
    output: str
    model: TunedModel
    dtype: Literal["float32", "float16", "bfloat16"]


def main() -> None:
    """python -m petals_tune.merge adapter=FOLDER_OR_HUB_NAME output=NEW_FOLDER [key=value ...]"""
    quiet_libraries()
    with report_errors():
        check_arguments(sys.argv[1:], config_name=CONFIG_NAME, schema=Merge)
        merge()


@hydra.main(version_base="1.3", config_path=str(folder_of("conf")), config_name=CONFIG_NAME)
def merge(cfg: DictConfig) -> None:
    """Write the base model with the LoRA adapter merged into its weights."""
    with report_errors():
        merge_adapter(cfg.adapter, Path(cfg.output), model=cfg.model.source, dtype=cfg.dtype)


def merge_adapter(adapter: str, output: Path, *, model: str | None = None, dtype: str = "float32") -> None:
    """Load the whole base model here, merge `adapter` into its weights, and write it to `output` with its tokenizer.

    Raises ConfigError where `output` exists, UnsupportedAdapter for a method that does not change weights, and
    UnsupportedModel where the base model cannot be loaded.
    """
    import torch  # this and the imports below are slow; a mistyped key should not wait for them
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from petals_tune.model.convert import model_folder
    from petals_tune.train.quiet import silence_known_warnings
    from petals_tune.tuning.saved import adapter_folder, base_of, saved_config

    silence_known_warnings()
    if output.exists():
        raise ConfigError(
            f"output={output} is there already: name a new folder, or remove this one", key="output", seen=output
        )
    folder = adapter_folder(adapter)
    config = saved_config(folder)
    if config.is_prompt_learning:
        raise UnsupportedAdapter(
            f"{folder} is a soft prompt: it stands before the text and changes no weight, so nothing can be merged; "
            "load it with PEFT, as its README.md says",
            key="adapter",
            seen=adapter,
        )
    base = base_of(folder) if model is None else model
    source = model_folder(base)
    print(f"loads {base} whole ...", flush=True)
    try:
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(
            f"the base model {base} cannot be loaded here: {str(error).strip().splitlines()[0]}; "
            "name a folder that has it, with model.source=FOLDER",
            key="model.source",
            seen=base,
        ) from None
    try:
        tuned = PeftModel.from_pretrained(plain, str(folder))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the adapter {folder} does not fit {base}: {str(error).strip().splitlines()[0]}; "
            "name its own base model, with model.source=...",
            key="model.source",
            seen=base,
        ) from None
    if not isinstance(tuned.base_model, BaseTuner):
        raise UnsupportedAdapter(
            f"{folder}: {config.peft_type} cannot be merged into weights; LoRA can", key="adapter", seen=adapter
        )
    merged = tuned.merge_and_unload(safe_merge=True)  # safe: raises where a weight is not finite
    with filling(output) as partial:
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    size_mb = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    print(f"merged {folder} into {base}: {output}, {size_mb:.0f} MB; use it as model.source={output}")


if __name__ == "__main__":
    main()
