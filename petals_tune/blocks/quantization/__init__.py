"""Registry of quantization schemes: one class a scheme, in a file of its own, looked up by name.

To add a scheme: write its class, and list it here. It costs nothing to look one up: bitsandbytes is imported on use.
"""

from __future__ import annotations

from petals_tune.blocks.quantization.base import Quantization
from petals_tune.blocks.quantization.int8 import Int8
from petals_tune.blocks.quantization.nf4 import NF4
from petals_tune.blocks.quantization.unquantized import Unquantized
from petals_tune.errors import ConfigError

SCHEMES: dict[str, Quantization] = {scheme.name: scheme for scheme in (Int8(), NF4(), Unquantized())}


def find_scheme(name: str, *, key: str = "quantization") -> Quantization:
    """The scheme of that name. Raises ConfigError, which lists those that exist, for the option `key`."""
    if name not in SCHEMES:
        raise ConfigError(f"{key}={name!r} is not one of {', '.join(sorted(SCHEMES))}", key=key, seen=name)
    return SCHEMES[name]


__all__ = ["SCHEMES", "Quantization", "find_scheme"]
