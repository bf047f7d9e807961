"""Number and kinds of blocks in a config, which `transformers`' loops over the blocks read, for a part of the blocks.

Some configs compute them from other fields, with properties that cannot be set: Jamba's kinds follow from a period, and
Nemotron-H's number of blocks from their kinds. Servers and clients hold other blocks than the config says, so such a
config gets a class of its own, in which they are plain fields.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

_FIELDS = ("num_hidden_layers", "layer_types")

# Kinds of blocks that keep a state, beside keys and values or in their place.
STATES = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding"})


def kinds_of_blocks(config: PretrainedConfig) -> list[str] | None:
    """The kind of each block, such as "full_attention" or "linear_attention"; None where all are of one kind."""
    kinds = getattr(config, "layer_types", None)
    return None if kinds is None else list(kinds)


def set_blocks(config: PretrainedConfig, number: int) -> None:
    """Set the number of blocks of `config`, in place. From then on their kinds can be set too, as `layer_types`."""
    _make_settable(config)
    config.num_hidden_layers = number


def restore_class(config: PretrainedConfig) -> None:
    """Give `config` its own class again, which computes number and kinds of blocks as before."""
    if isinstance(config, _Settable):
        own: Any = type(config).__mro__[2]
        for name in _computed(own):
            vars(config).pop(name, None)
        config.__class__ = own


class _Settable:
    """Base of the classes that are made here."""


def _make_settable(config: PretrainedConfig) -> None:
    """Give `config` a class in which what is set here is no property."""
    own: Any = type(config)
    computed = _computed(own)
    if not computed or isinstance(config, _Settable):
        return
    values = {name: getattr(config, name) for name in computed}
    config.__class__ = type(own.__name__, (_Settable, own), {"__module__": own.__module__, **dict.fromkeys(computed)})
    for name, value in values.items():
        setattr(config, name, value)


def _computed(config_class: Any) -> list[str]:
    """Which of the fields, by the names that they have in `config_class`, are properties there."""
    names = [config_class.attribute_map.get(name, name) for name in _FIELDS]
    return [name for name in names if isinstance(getattr(config_class, name, None), property)]
