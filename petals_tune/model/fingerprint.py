"""Fingerprints of models: digests of their values, which tell a model from others of the same shape."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.families import family_of, placeholder_model
from petals_tune.model.stored import StoredTensor, opened

SAMPLED_ROWS = 16  # of a tensor: 0.1 s for 135M parameters, while whole files would take minutes for 70B


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """SHA-256 digests of a model, each of a part that may be known or not.

    Of every tensor the name, the shape and 16 evenly spaced rows count, floats as float32: the same values in other
    files or in a wider dtype are the same model. Fine-tuned weights and merged adapters change every row. Packed
    weights count as they are stored: the same model in another format is another one.
    """

    config: str  # architecture and the tensors' names, as servers announce it
    outside: str  # tensors outside the blocks, which every client has
    blocks: str | None  # tensors of the blocks; None for a model on a hub, of which not all were downloaded
    files: str | None = None  # SHA-256 sums of the files of weights, as a hub lists them; None elsewhere

    @classmethod
    def of(cls, source: str, revision: str | None = None) -> Fingerprint:
        """Compute the fingerprint of a folder in Hugging Face format, or of a revision of a model on a hub.

        Raises UnsupportedModel, HubUnreachable.
        """
        checkpoint = Checkpoint(source, revision=revision)
        family = family_of(placeholder_model(checkpoint.config), checkpoint.config)
        inside = {name for name in checkpoint.stored_names if family.block_index(name) is not None}
        outside = set(checkpoint.stored_names) - inside
        config, _, files = checkpoint.digest.partition(".")
        return cls(
            config=config,
            outside=_digest(checkpoint, outside),
            blocks=None if checkpoint.commit else _digest(checkpoint, inside),
            files=files or None,
        )

    def difference(self, other: Fingerprint) -> str | None:
        """Name the first part that both know and that differs; None where there is none.

        "config", "embeddings or head", "blocks", or "files of weights", of two models on hubs.
        """
        parts = {
            "config": (self.config, other.config),
            "embeddings or head": (self.outside, other.outside),
            "blocks": (self.blocks, other.blocks),
            "files of weights": (self.files, other.files),
        }
        return next((name for name, (one, two) in parts.items() if one and two and one != two), None)


def _digest(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    by_path: dict[Path, list[StoredTensor]] = {}
    for tensor in checkpoint.parts(names).values():
        by_path.setdefault(tensor.path, []).append(tensor)
    sums = {}
    for path, tensors in by_path.items():
        with opened(path) as file:
            for tensor in tensors:
                digest = hashlib.sha256(repr((tensor.name, tensor.shape)).encode())
                for rows in _samples(file.get_slice(tensor.name), tensor.shape):
                    exact = rows.to(torch.float32) if rows.is_floating_point() else rows
                    digest.update(exact.contiguous().numpy().data)
                sums[tensor.name] = digest.hexdigest()
    return hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()


def _samples(stored: Any, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """Read evenly spaced rows of a tensor, the first and the last among them; of a vector all."""
    if not all(shape):
        return
    if len(shape) < 2:
        yield stored[...]
        return
    # The experts of a fused layer are rows too, of which one may have 100 MB.
    inner = [slice(SAMPLED_ROWS)] * (len(shape) - 2)
    for number in sorted({index * (shape[0] - 1) // (SAMPLED_ROWS - 1) for index in range(SAMPLED_ROWS)}):
        yield stored[(slice(number, number + 1), *inner)]
