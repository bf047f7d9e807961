"""A fine-tuning toolkit over a remote backbone: the blocks run on servers, what is trained stays with you."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from petals_tune.remote.auto import AutoDistributedModelForCausalLM
    from petals_tune.swarm.local import local_swarm

__all__ = ["AutoDistributedModelForCausalLM", "local_swarm"]

_WHERE = {
    "AutoDistributedModelForCausalLM": "petals_tune.remote.auto",
    "local_swarm": "petals_tune.swarm.local",
}


def __getattr__(name: str) -> Any:
    """Import on first use: servers and `--help` need little of this package."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
