"""Registry of quantization schemes: one class a scheme, in a file of its own, looked up by name.

To add a scheme: write its class, and list it here. The names are needed where options are checked, before anything slow
is imported: a scheme imports torch, transformers and bitsandbytes on use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from petals_tune.blocks.quantization.base import Quantization
from petals_tune.blocks.quantization.int8 import Int8
from petals_tune.blocks.quantization.int8_activations import Int8Activations
from petals_tune.blocks.quantization.nf4 import NF4
from petals_tune.blocks.quantization.unquantized import Unquantized
from petals_tune.errors import ConfigError

SCHEMES: dict[str, Quantization] = {scheme.name: scheme for scheme in (Int8(), Int8Activations(), NF4(), Unquantized())}

if TYPE_CHECKING:
    SchemeName = str
else:
    SchemeName = Literal[tuple(sorted(SCHEMES))]  # of an option: a value that is none of them is refused with the list


def find_scheme(name: str) -> Quantization:
    """The scheme of that name. Raises ConfigError, which lists those that exist."""
    if name not in SCHEMES:
        raise ConfigError(
            f"quantization={name!r} is not one of {', '.join(sorted(SCHEMES))}", key="quantization", seen=name
        )
    return SCHEMES[name]


def usable_schemes(wanted: str | None) -> tuple[str, ...]:
    """The schemes of servers that a client may use: the `wanted` one, or all but those that have to be named."""
    if wanted is not None:
        return (find_scheme(wanted).name,)
    return tuple(name for name, scheme in SCHEMES.items() if not scheme.on_request)


__all__ = ["SCHEMES", "Quantization", "SchemeName", "find_scheme", "usable_schemes"]
