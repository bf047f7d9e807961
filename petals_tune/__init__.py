"""Fine-tuning of language models whose frozen blocks run on servers; trained parameters stay on the client."""

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

_MODULES = {
    "AutoDistributedModel": "petals_tune.remote.auto",
    "AutoDistributedModelForCausalLM": "petals_tune.remote.auto",
    "AutoDistributedModelForSequenceClassification": "petals_tune.remote.auto",
    "local_swarm": "petals_tune.swarm.local",
}


def __getattr__(name: str) -> Any:
    """Import a name on first use: servers and `--help` need little of this package.

    A name such as `DistributedBloomForCausalLM` exists for each model class of transformers.
    """
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    if name.startswith("Distributed"):
        return import_module("petals_tune.remote.auto").distributed_class_named(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
