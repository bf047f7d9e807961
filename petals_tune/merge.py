"""Merge a LoRA adapter into a whole local model: python -m petals_tune.merge adapter=FOLDER output=NEW_FOLDER"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import hydra
from omegaconf import DictConfig

from petals_tune.cli import quiet_libraries, report_errors
from petals_tune.config import TunedModel, check_arguments, folder_of
from petals_tune.errors import ConfigError, UnsupportedAdapter, UnsupportedModel
from petals_tune.files import filling

if TYPE_CHECKING:
    from torch import Tensor

    from petals_tune.model.checkpoint import Checkpoint

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
        merge_adapter(
            cfg.adapter, Path(cfg.output), model=cfg.model.source, revision=cfg.model.revision, dtype=cfg.dtype
        )


def merge_adapter(
    adapter: str, output: Path, *, model: str | None = None, revision: str | None = None, dtype: str = "float32"
) -> None:
    """Load the whole base model here, merge `adapter` into its weights, and write it to `output` with its tokenizer.

    The model is loaded and merged in float32, and rounded to `dtype` once. A classifier keeps its trained head and the
    names of its labels, a language model its resized vocabulary; a head that no longer equals the embeddings is untied.
    Before anything is written, the merged logits are compared with the adapter's.

    Raises ConfigError where `output` exists or the adapter is of another model, UnsupportedAdapter for a method that
    does not change weights, and UnsupportedModel where the base model cannot be loaded.
    """
    import torch  # this and the imports below are slow; a mistyped key should not wait for them
    from peft.tuners.tuners_utils import BaseTuner
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from petals_tune.data.collate import choose_pad_id
    from petals_tune.model.checkpoint import Checkpoint
    from petals_tune.model.convert import model_folder
    from petals_tune.train.quiet import silence_known_warnings
    from petals_tune.tuning.saved import (
        adapter_folder,
        check_adapter,
        choose_base,
        head_rows,
        load_tokenizer,
        saved_config,
        wrap_with_adapter,
    )

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
    classes: dict[str, Any] = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_CLS": AutoModelForSequenceClassification}
    task = config.task_type or "CAUSAL_LM"
    if task not in classes:
        raise UnsupportedAdapter(
            f"{folder} is for {task}; adapters for {' and '.join(classes)} can be merged", key="adapter", seen=task
        )
    base, revision = choose_base(folder, source=model, revision=revision)
    source = model_folder(base, revision)
    identity = check_adapter(folder, task=task, source=source, revision=revision, named=base)
    labels = {"num_labels": head_rows(folder)} if task == "SEQ_CLS" else {}
    print(f"loads {base} whole ...", flush=True)
    checkpoint = Checkpoint(source, revision=revision)
    try:
        plain = (
            load_unpacked(classes[task], checkpoint, **labels)
            if checkpoint.is_packed
            else classes[task].from_pretrained(source, revision=revision, dtype=torch.float32, **labels)
        )
    except UnsupportedModel:
        raise
    except (OSError, ValueError) as error:
        raise UnsupportedModel(
            f"the base model {base} cannot be loaded here: {str(error).strip().splitlines()[0]}; "
            "name a folder that has it, with model.source=FOLDER",
            key="model.source",
            seen=base,
        ) from None
    tokenizer: Any = load_tokenizer(source, folder, revision)
    tuned: Any = wrap_with_adapter(plain, folder).eval()
    if not isinstance(tuned.base_model, BaseTuner):
        raise UnsupportedAdapter(
            f"{folder}: {config.peft_type} cannot be merged into weights; LoRA can", key="adapter", seen=adapter
        )
    expected = sample_logits(tuned)
    was_tied = separate_head(tuned.get_base_model())
    try:
        merged = tuned.merge_and_unload(safe_merge=True)  # safe: raises where a weight is not finite
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise UnsupportedAdapter(
            f"{folder}: PEFT cannot merge this {config.peft_type}: {str(error).strip().splitlines()[0]}",
            key="adapter",
            seen=adapter,
        ) from None
    if was_tied:
        tie_head_if_equal(merged)
    found = sample_logits(merged)
    if not torch.allclose(found, expected, rtol=0, atol=1e-3 * expected.abs().max().item()):
        raise UnsupportedAdapter(
            f"{folder}: merged weights give other logits than the adapter, by {(found - expected).abs().max():.2g} of "
            f"{expected.abs().max():.2g}; use it unmerged",
            key="adapter",
            seen=adapter,
        )
    if task == "SEQ_CLS":
        if merged.config.pad_token_id is None:  # of which the head's position depends, in batches
            merged.config.pad_token_id = choose_pad_id(tokenizer)
        if identity is not None and identity.labels:
            merged.config.id2label = {index: label.strip() for index, label in enumerate(identity.labels)}
            merged.config.label2id = {label: index for index, label in merged.config.id2label.items()}
    merged = merged.to(getattr(torch, dtype))
    if (overflown := next((n for n, p in merged.named_parameters() if not p.isfinite().all()), None)) is not None:
        raise ConfigError(f"{overflown} is too large for {dtype}: choose dtype=bfloat16", key="dtype", seen=dtype)
    asked = identity.prompting if identity is not None else None
    if asked is not None and asked.form == "chat":
        tokenizer.chat_template = asked.chat_template
    with filling(output) as partial:
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    size_mb = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    print(f"merged {folder} into {base}: {output}, {size_mb:.0f} MB; use it as model.source={output}")
    if asked is not None and asked.system:
        print(f"it was trained with the system text {asked.system!r}: give it to chat as system=TEXT")


def load_unpacked(auto_class: Any, checkpoint: Checkpoint, **labels: Any) -> Any:
    """Load a whole model of packed weights in float32, as servers read it: no kernel of its format is wanted.

    Raises UnsupportedModel where the checkpoint lacks tensors, or transformers such a class.
    """
    import torch

    from petals_tune.model.families import load_part

    found = auto_class._model_mapping.get(type(checkpoint.config), None)
    if found is None:
        model_type = checkpoint.config.model_type
        text = f"transformers has no {auto_class.__name__} for model_type={model_type!r}"
        raise UnsupportedModel(text, source=checkpoint.source, key="model.source", model_type=model_type)
    config = copy.deepcopy(checkpoint.config)
    for name, value in labels.items():
        setattr(config, name, value)
    model_class = found[0] if isinstance(found, tuple) else found
    tensors = checkpoint.stored(checkpoint.tensor_names, torch.float32)
    model, loading = load_part(model_class, config, tensors, dtype=torch.float32)
    new = () if model.can_generate() else ("score.", "classifier.")  # a classifier's head comes with the adapter
    if missing := sorted(name for name in loading["missing_keys"] if not name.startswith(new)):
        raise UnsupportedModel(
            f"{checkpoint.source} lacks tensors: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}",
            key="model.source",
            seen=missing,
        )
    if model.can_generate():
        model.generation_config = checkpoint.generation_config
    return model


def sample_logits(model: Any) -> Tensor:
    """Compute the logits of a row with the first and the last token ids of the vocabulary."""
    import torch

    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = [*range(min(8, vocabulary)), *range(max(0, vocabulary - 8), vocabulary)]
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits


def separate_head(model: Any) -> bool:
    """Give tied output embeddings weights of their own: merging changes weights in place. Returns whether they were."""
    from torch import nn

    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    inner = [layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer for layer in layers if layer]
    if len(inner) < 2 or inner[0].weight is not inner[1].weight:
        return False
    inner[1].weight = nn.Parameter(inner[1].weight.detach().clone(), requires_grad=False)
    return True


def tie_head_if_equal(model: Any) -> None:
    """Tie the output embeddings again, or untie them in the config where they no longer equal the input embeddings."""
    import torch

    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    equal = torch.equal(embeddings.weight, head.weight)
    if equal:
        head.weight = embeddings.weight
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = equal


if __name__ == "__main__":
    main()
