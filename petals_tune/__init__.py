"""A fine-tuning toolkit over a remote backbone: the blocks run on servers, what is trained stays with you."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from petals_tune.remote.auto import (
        AutoDistributedModel,
        AutoDistributedModelForCausalLM,
        AutoDistributedModelForSequenceClassification,
    )
    from petals_tune.swarm.local import local_swarm

__version__ = "0.1.0"
__all__ = [
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "local_swarm",
]

_WHERE = {
    "AutoDistributedModel": "petals_tune.remote.auto",
    "AutoDistributedModelForCausalLM": "petals_tune.remote.auto",
    "AutoDistributedModelForSequenceClassification": "petals_tune.remote.auto",
    "local_swarm": "petals_tune.swarm.local",
}


def __getattr__(name: str) -> Any:
    """Import on first use: servers and `--help` need little of this package.

    `DistributedBloomForCausalLM` and its like are there for every model class of transformers.
    """
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    if name.startswith("Distributed"):
        return import_module("petals_tune.remote.auto").distributed_class_named(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
