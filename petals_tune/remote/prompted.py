"""`tuning_mode` and `pre_seq_len` as in the Petals API, by PEFT's prompt tuning and our own deep prompts."""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft import PromptTuningConfig, TaskType

from petals_tune.errors import ConfigError
from petals_tune.tuning.deep_prompt import DeepPromptConfig
from petals_tune.tuning.support import tune

TUNING_MODES = {"ptune": PromptTuningConfig, "deep_ptune": DeepPromptConfig}


class TextPositions:
    """Mixed into a PeftModel: its outputs are those of the text, the prompt's positions left out."""

    def forward(self, input_ids: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(input_ids, *args, **kwargs)  # type: ignore[misc]  # of PEFT's class
        text = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        if text is not None:
            for name in ("logits", "last_hidden_state"):
                if (value := output.get(name)) is not None and value.dim() == 3:
                    output[name] = value[:, -text.shape[1] :]
            if (states := output.get("hidden_states")) is not None:
                output["hidden_states"] = tuple(state[:, -text.shape[1] :] for state in states)
        return output


def check_tuning_mode(tuning_mode: str | None, pre_seq_len: int | None) -> None:
    """Raises ConfigError for an unknown mode, and where one is given without the other."""
    if (tuning_mode is None) != (pre_seq_len is None):
        text = f"tuning_mode={tuning_mode!r} and pre_seq_len={pre_seq_len} go together: give both, or none"
        raise ConfigError(text, key="pre_seq_len" if pre_seq_len is None else "tuning_mode")
    if tuning_mode is not None and tuning_mode not in TUNING_MODES:
        text = f"tuning_mode={tuning_mode!r} is not one of {', '.join(TUNING_MODES)}"
        raise ConfigError(text, key="tuning_mode", seen=tuning_mode)


def with_prompts(model: Any, tuning_mode: str, pre_seq_len: int) -> Any:
    """A PeftModel around `model`, with `pre_seq_len` trained positions."""
    config = TUNING_MODES[tuning_mode](task_type=_task(model), num_virtual_tokens=pre_seq_len)
    net: Any = tune(model, config)
    plain: Any = type(net)
    net.__class__ = _with_text_positions(plain)
    return net.eval()


@functools.cache
def _with_text_positions(plain: Any) -> Any:
    return type(plain.__name__, (TextPositions, plain), {})


def _task(model: Any) -> TaskType:
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return TaskType.SEQ_CLS
    return TaskType.CAUSAL_LM if model.can_generate() else TaskType.FEATURE_EXTRACTION
