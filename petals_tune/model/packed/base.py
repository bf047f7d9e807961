"""Base class of packed formats, and weights that are unpacked when they are indexed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from petals_tune.model.stored import StoredTensor

_VALUES_AT_ONCE = 2**20
REAL = "F16 BF16 F32"  # kinds of scales

# The values of E2M1, a float of 4 bits, for each byte of two: the low half first.
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_PAIRS = torch.stack([_E2M1.repeat(16), _E2M1.repeat_interleave(16)], dim=-1).view(torch.int64).flatten()
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)


class Part(NamedTuple):
    """What a stored tensor is to a packed weight."""

    weight: str  # name of the weight, as the tensor is called in the same model unpacked
    role: str  # "weight", "scale", ..., by the format; "unused": it is not needed to unpack the weight


class PackedFormat(ABC):
    """A way to store weights in fewer bits, in several tensors each, as config.json's `quantization_config` says."""

    method: ClassVar[str]  # its `quant_method`
    endings: ClassVar[Mapping[str, Part]]  # end of a stored name -> (end of the weight's name, role)

    @abstractmethod
    def __init__(self, options: Mapping[str, Any]):
        """`options` is the `quantization_config`. Raises ValueError with what in it is not known here."""

    def parts_of(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Find the packed weights among the names of stored tensors: weight -> role -> stored name."""
        names = list(names)
        found: dict[str, dict[str, str]] = {}
        for name in names:
            ending = max((end for end in self.endings if name.endswith(end)), key=len, default=None)
            if ending is not None:
                end, role = self.endings[ending]
                found.setdefault(name.removesuffix(ending) + end, {})[role] = name
        for name in names:
            if name in found:
                found[name]["weight"] = name
        return found

    @abstractmethod
    def shape_of(self, parts: Mapping[str, StoredTensor]) -> tuple[int, ...]:
        """Return the shape of the weight. Raises UnsupportedModel where the shapes of its parts contradict it."""

    @abstractmethod
    def unpack(self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, name: str) -> None:
        """Write the values of one matrix into `weight` (out, in); `parts` are its own, `name` is the weight's.

        Raises ValueError with what is wrong with the parts' values.
        """


@dataclass(frozen=True, kw_only=True)
class PackedTensor:
    """A weight that is stored in parts. Indexing unpacks it: `[...]` all of it, `[i]` and `[i:j]` experts alone.

    While it is unpacked, its parts and a few MB are in memory beside it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Mapping[str, StoredTensor]
    format: PackedFormat

    def __getitem__(self, index: Any) -> torch.Tensor:
        parts = {role: part[...] for role, part in self.parts.items()}  # mapped, and read where they are unpacked
        if len(self.shape) == 2:
            weight = torch.empty(self.shape, dtype=self.dtype)
            self._unpack(parts, weight)
            return weight if index is Ellipsis else weight[index]
        experts = range(self.shape[0])
        chosen = experts[index] if isinstance(index, int | slice) else experts
        numbers = [chosen] if isinstance(chosen, int) else chosen
        weights = torch.empty((len(numbers), *self.shape[1:]), dtype=self.dtype)
        for number, weight in zip(numbers, weights, strict=True):
            self._unpack({role: part[number] for role, part in parts.items()}, weight)
        if isinstance(index, int):
            return weights[0]
        return weights if index is Ellipsis or isinstance(index, slice) else weights[index]

    def _unpack(self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor) -> None:
        try:
            self.format.unpack(parts, weight, self.name)
        except ValueError as error:
            raise next(iter(self.parts.values())).unfit(str(error)) from None


def require(parts: Mapping[str, StoredTensor], *roles: str) -> None:
    """Raise UnsupportedModel where a weight lacks a part."""
    if missing := [role for role in roles if role not in parts]:
        raise next(iter(parts.values())).unfit(f"lacks its {' and '.join(missing)}")


def check(part: StoredTensor, kinds: str, *shapes: tuple[int, ...]) -> None:
    """Raise UnsupportedModel where a part has none of the `shapes`, or none of the `kinds`, such as "F16 F32"."""
    if part.shape not in shapes or part.kind not in kinds.split():
        raise part.unfit(f"should be {' or '.join(kinds.split())} {' or '.join(map(str, shapes))}")


def row_slices(weight: torch.Tensor, multiple: int = 1) -> Iterator[slice]:
    """Cut the rows of a matrix into slices of about a million values, each but the last a `multiple` of rows."""
    step = max(1, _VALUES_AT_ONCE // max(1, weight.shape[1]) // multiple) * multiple
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


def words_to_numbers(
    words: torch.Tensor, bits: int, *, along: int = 1, places: torch.Tensor | None = None
) -> torch.Tensor:
    """Unpack int32 words (rows, columns) to numbers without a sign, int32, 32 / bits for each word `along` a dimension.

    `places` are those of the first, second, ... number in a word; None: from the lowest bits on.
    """
    shifts = bits * (torch.arange(32 // bits, dtype=torch.int32) if places is None else places)
    if along == 0:
        return ((words[:, None] >> shifts[:, None]) & (2**bits - 1)).flatten(0, 1)
    return ((words[..., None] >> shifts) & (2**bits - 1)).flatten(1)


def fp4_values(pairs: torch.Tensor) -> torch.Tensor:
    """Unpack bytes (..., n) of two E2M1 floats each: (..., 2n) float32, the low half of a byte first."""
    found = torch.index_select(_PAIRS, 0, pairs.view(torch.uint8).flatten().int())  # 70 times as fast as indexing
    return found.view(torch.float32).reshape(*pairs.shape[:-1], 2 * pairs.shape[-1])


def fp8_values(stored: torch.Tensor) -> torch.Tensor:
    """Return float8_e4m3fn numbers as float32: on a CPU a table is 5 times as fast as torch's cast."""
    return torch.index_select(_E4M3, 0, stored.view(torch.uint8).flatten().int()).view(stored.shape)


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """Return scales as float32; bytes are exponents of two, as the E8M0 type of microscaling formats has them."""
    if scale.dtype is torch.uint8:
        return torch.exp2(scale.to(torch.float32) - 127)
    return scale.to(torch.float32)


def group_size(options: Mapping[str, Any], key: str = "group_size", default: int | None = None) -> int | None:
    """Return how many inputs share a scale; None: all. Raises ValueError for what is no size."""
    size = options.get(key, default)
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size == 0 or size < -1):
        raise ValueError(f"{key}={size!r}, where a number of inputs or -1 can be read")
    return None if size == -1 else size


def block_size(options: Mapping[str, Any], key: str) -> tuple[int, int] | None:
    """Return the rows and columns of a block with one scale; None where there is none. Raises ValueError."""
    size = options.get(key)
    if size is None:
        return None
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise ValueError(f"{key}={size!r}, where two numbers or null can be read")
    return size[0], size[1]


def unknown(options: Mapping[str, Any], **known: Iterable[Any]) -> None:
    """Raise ValueError where one of the `options` has a value that is not among the `known` ones."""
    for key, values in known.items():
        if key in options and options[key] not in (allowed := list(values)):
            raise ValueError(f"{key}={options[key]!r}, where {' or '.join(map(str, allowed))} can be read")
