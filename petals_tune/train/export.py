"""The trained adapter as files that stock PEFT reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, PromptTuningConfig, PromptTuningInit

from petals_tune.files import filling
from petals_tune.tuning.deep_prompt import DeepPromptConfig, save_deep_prompts

_CARD = """---
library_name: peft
---
A {method} adapter for the base model `{base}`, trained with petals_tune over remote blocks. To load it with PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "path/to/this/folder")
```
"""


def export_adapter(net: PeftModel, folder: Path, *, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors of the active adapter; `base` names the base model.

    Stock `PeftModel.from_pretrained(model, folder)` loads it, on a local model or on a remote one.
    """
    config = net.peft_config[net.active_adapter]
    config.base_model_name_or_path = base
    if isinstance(config, PromptTuningConfig):
        # What the prompt began with is history (config.yaml has it), and the tokenizer's path is this machine's.
        config.prompt_tuning_init = PromptTuningInit.RANDOM
        config.prompt_tuning_init_text = config.tokenizer_name_or_path = None
    with filling(folder) as partial:
        # "auto" would ask a hub whether the base model's vocabulary grew; nothing here resizes it.
        net.save_pretrained(str(partial), save_embedding_layers=False)
        if isinstance(config, DeepPromptConfig):
            base_model: Any = net.get_base_model()
            save_deep_prompts(base_model, partial)
        # PEFT's own card is a form to fill in, with this machine's paths.
        card = _CARD.format(method=type(config).__name__.removesuffix("Config"), base=base)
        (partial / "README.md").write_text(card, encoding="utf-8")
