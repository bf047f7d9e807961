"""Cache of quantized blocks on disk: a second start neither reads nor quantizes the full ones."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from petals_tune.errors import ConfigError
from petals_tune.files import replacing
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.disk import DiskCache

logger = logging.getLogger(__name__)

_FORMAT = 2  # of the state dicts: what quantizes or names their tensors otherwise gets another number


@dataclass(frozen=True, kw_only=True)
class QuantizedBlockCache:
    """Blocks of one checkpoint in one quantization, a file each."""

    disk: DiskCache
    checkpoint: Checkpoint
    quantization: str
    dtype: torch.dtype  # of what is not quantized

    def get(self, block: int, names: Sequence[str]) -> dict[str, torch.Tensor] | None:
        """The state dict of `block`, whose tensors in the checkpoint are `names`; None where it is not in the cache.

        The tensors are views of the mapped file: servers on one machine share the memory.
        """
        path = self._path(block, names)
        try:
            with safe_open(path, framework="pt") as opened:
                state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
                if (opened.metadata() or {}).get("checksum") != _checksum(state):
                    raise SafetensorError("its checksum is another one")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged, the block is quantized again: %s", path, error)
            return None
        self.disk.used(path)
        return state

    def put(self, block: int, names: Sequence[str], state: dict[str, torch.Tensor]) -> None:
        """Write the state dict of `block`. Where the disk is full or read-only, a warning is logged, and no more."""
        path = self._path(block, names)
        size_bytes = sum(tensor.nbytes for tensor in state.values())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self.disk.room_for(size_bytes, f"block {block}"), replacing(path, shared=True) as partial:
                about = {"source": self.checkpoint.source, "block": str(block), "checksum": _checksum(state)}
                save_file(state, partial, metadata=about)
        except (ConfigError, SafetensorError, OSError) as error:
            logger.warning("block %d is not kept for the next start: %s", block, error)

    def _path(self, block: int, names: Sequence[str]) -> Path:
        libraries = [version("bitsandbytes"), version("transformers")]
        what = [_FORMAT, self.checkpoint.state_of(names), sorted(names), self.quantization, str(self.dtype), libraries]
        key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
        return self.disk.quantized / key / f"{block}.safetensors"


def _checksum(state: Mapping[str, torch.Tensor]) -> str:
    """XXH3 of the tensors with their names, types and shapes: a bit that flips on the disk would change numbers."""
    sums = xxhash.xxh3_128()
    for name, tensor in sorted(state.items()):
        sums.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        sums.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sums.hexdigest()
