"""Fields of a model's config: those that concern the client's part may be changed, those of the blocks may not."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PretrainedConfig

from petals_tune.errors import ConfigError

# What embeddings, final norm, head, loss and generate() read. All else may concern the blocks, whose config servers
# read from the checkpoint: a change of it would be followed here and not there.
_OF_THE_CLIENT = frozenset(
    {
        *("architectures", "transformers_version", "dtype", "return_dict", "use_cache"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "router_aux_loss_coef"),
        *("num_labels", "id2label", "label2id", "problem_type", "classifier_dropout"),
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
        *("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"),
        *("tie_word_embeddings", "initializer_range", "init_std", "embd_pdrop", "embedding_multiplier"),
        *("final_logit_softcapping", "logit_scale", "logits_scaling"),
    }
)


def with_changes(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """Copy `config` with other values. Raises ConfigError for an unknown field, or one that concerns the blocks."""
    if "torch_dtype" in changes:  # configs have it still
        raise ConfigError("from_pretrained: torch_dtype is called dtype", key="torch_dtype")
    if unknown := [name for name in changes if not hasattr(config, name)]:
        text = f"from_pretrained: {unknown[0]} is no option, and no field of {type(config).__name__}"
        raise ConfigError(text, key=unknown[0])
    changed = copy.deepcopy(config)
    for name, value in changes.items():
        if name not in _OF_THE_CLIENT and _as_plain(getattr(config, name)) != _as_plain(value):
            raise _refusal(name, value)
        setattr(changed, name, value)
    return changed


class BlocksConfig:
    """The values of a config that may concern the blocks, as servers have them."""

    def __init__(self, config: PretrainedConfig):
        self._values = {
            name: copy.deepcopy(_as_plain(value))
            for name, value in vars(config).items()
            if not name.startswith("_") and name not in _OF_THE_CLIENT
        }

    def check(self, config: PretrainedConfig) -> None:
        """Raises ConfigError for a value of `config` that was changed."""
        now = vars(config)
        for name, value in self._values.items():
            if name not in now or _as_plain(now[name]) != value:
                raise _refusal(name, now.get(name))


def _as_plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, PretrainedConfig) else value


def _refusal(name: str, value: Any) -> ConfigError:
    return ConfigError(
        f"{name}={value!r}: this field of the config may concern the blocks, and servers take theirs from the "
        "checkpoint; write it into config.json of a copy of the model, for servers and clients",
        key=name,
        seen=value,
    )
