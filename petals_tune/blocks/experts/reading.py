"""Finds the matrix of one expert in a checkpoint, in whatever form transformers reads the experts of its family.

Checkpoints hold experts one by one or as one tensor, under names and in layouts of their own; transformers' conversion
mapping says how its parameters are made of them. Here the same operations run on the tensors of one expert at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


class Readable(Protocol):
    """A tensor in a file, as `Checkpoint.stored` returns it: `[...]` reads all of it, `[i]` and `[i:j]` a part."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class StoredExperts:
    """Where the matrices of one parameter of experts are: names of tensors by the pattern that they match."""

    parameter: str  # its name in the model
    converter: WeightConverter | None  # None: one tensor, as the parameter is
    names: dict[str, list[str]] = field(default_factory=dict)

    def renamed(self, names: Mapping[str, str]) -> StoredExperts:
        """The same with other names of the tensors."""
        return replace(self, names={pattern: [names[name] for name in own] for pattern, own in self.names.items()})

    def lacks(self, experts: int) -> bool:
        """Are there tensors missing, for that many experts?"""
        wanted = self.converter.source_patterns if self.converter is not None else self.names
        return any(len(self.names.get(pattern, ())) != (experts if "*" in pattern else 1) for pattern in wanted)

    def whole(self, tensors: Mapping[str, Readable]) -> torch.Tensor | None:
        """Read the experts of all at once, where the parameter is stored as it is; None elsewhere."""
        if self.converter is not None:
            return None
        ((name,),) = self.names.values()
        return tensors[name][...]

    def read(
        self, expert: int, tensors: Mapping[str, Readable], shape: tuple[int, ...], config: PretrainedConfig
    ) -> torch.Tensor:
        """Read one expert's matrix, as the parameter of `shape` (E, rows, columns) has it."""
        if self.converter is None:
            ((name,),) = self.names.values()
            stored = tensors[name]
            if len(stored.shape) == 2:  # DBRX: one expert's rows after the other's
                return stored[expert * shape[1] : (expert + 1) * shape[1]]
            return stored[expert]
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.names.items():
            of_one = "*" in pattern
            part: Any = tensors[names[expert]][...] if of_one else tensors[names[0]][expert : expert + 1]
            converter.add_tensor(self.parameter, names[expert if of_one else 0], pattern, part)
        made: Any = converter.convert(self.parameter, model=_OneExpert(shape), config=config)
        value = made[self.parameter] if self.parameter in made else next(iter(made.values()))
        return (value[0] if isinstance(value, list) else value)[0]


@dataclass(frozen=True)
class _OneExpert:
    """What an operation of transformers asks the model: the shape of the parameter, here with one expert."""

    shape: tuple[int, ...]

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty(1, *self.shape[1:], device="meta")


class ExpertReader:
    """transformers' conversion mapping for one model, for parameters of experts."""

    def __init__(self, model: PreTrainedModel, conversions: str | None = None):
        """Read the mapping of `model`, or that which was registered by the name `conversions`."""
        named = None if conversions is None else get_checkpoint_conversion_mapping(conversions)
        mapping = get_model_conversion_mapping(model) if named is None else named
        self._prefix = model.base_model_prefix
        self._renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        self._converters = [each for each in mapping if isinstance(each, WeightConverter)]
        self._by_pattern = {pattern: each for each in self._converters for pattern in each.source_patterns}

    def find(self, names: Iterable[str], parameters: Iterable[str]) -> dict[str, StoredExperts]:
        """The stored experts of each of `parameters`, by its name in the model, among tensors of these names.

        Parameters that none of the tensors belongs to are left out.
        """
        wanted = dict.fromkeys(parameters, True)
        found: dict[str, StoredExperts] = {}
        for name in sorted(names, key=dot_natural_key):
            renamed, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, wanted)
            if renamed not in wanted and name in wanted:
                renamed, pattern = name, None
            converter = None if pattern is None else self._by_pattern[pattern]
            first, *others = [renamed] if converter is None else converter.target_patterns
            targets = [renamed, *(renamed.replace(first, other) for other in others)]
            for parameter in targets:
                if parameter in wanted:
                    stored = found.setdefault(parameter, StoredExperts(parameter=parameter, converter=converter))
                    stored.names.setdefault(pattern or name, []).append(name)
        return found
