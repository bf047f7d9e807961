"""Versions of an adapter as servers have them on a slow line: each an 8-bit difference from an earlier one.

What is rounded off a difference is in the next one: servers are never further from the trained tensors than half a
step of 8 bits of one optimizer step's change, however long the training (error feedback: Seide et al. 2014).
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from dataclasses import replace

import msgspec
import torch

from petals_tune.wire.adapter import AdapterDifference, AdapterVersion, add_difference
from petals_tune.wire.tensors import as_received, in_format

_FORMAT = "blockwise8"
KEPT = 8  # versions, each with all of its tensors


class AdapterVersions:
    """The last versions that were sent for training, each with the tensors that servers have. For several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sent: deque[tuple[str, AdapterVersion]] = deque(maxlen=KEPT)  # and the version that was asked for

    @torch.no_grad()
    def next(self, exact: AdapterVersion) -> AdapterVersion:
        """The version to send in the place of `exact`: near it, by a difference from the last one that is like it.

        `exact` itself where there is no such one.
        """
        with self._lock:
            for asked, sent in self._sent:
                if asked == exact.version:
                    return sent
            # First the same tensors before the last optimizer step; an evaluation in between leaves them unnamed.
            known = sorted(self._sent, key=lambda each: each[0] == exact.replaces)
            replaced = known[-1][1].version if known and known[-1][0] == exact.replaces else None
            near = next((near for _, base in reversed(known) if (near := _near(exact, base)) is not None), exact)
            sent = near if near is exact and replaced is None else replace(near, replaces=replaced)
            self._sent.append((exact.version, sent))
            return sent


def _near(exact: AdapterVersion, base: AdapterVersion) -> AdapterVersion | None:
    """`base` with the difference to `exact` added, in 8 bits; None where the difference is larger than the tensors."""
    if [part.frame for part in exact.parts] != [part.frame for part in base.parts]:
        return None
    differences = []
    for part, before in zip(exact.parts, base.parts, strict=True):
        rounded = []
        for tensor, earlier in zip(part.tensors, before.tensors, strict=True):
            change = tensor.float() - earlier.float()
            if not change.abs().max() <= tensor.abs().max():  # nor where they are not finite
                return None
            rounded.append(as_received(change, _FORMAT))
        differences.append(msgspec.structs.replace(part, tensors=rounded))
    name = hashlib.sha256(f"{base.version} {exact.version}".encode()).hexdigest()
    parts = tuple(add_difference(base.parts, differences))
    on_the_wire = (
        msgspec.structs.replace(part, tensors=[in_format(tensor, _FORMAT) for tensor in part.tensors])
        for part in differences
    )
    difference = AdapterDifference(base=base.version, parts=tuple(on_the_wire))
    return replace(exact, version=name, parts=parts, difference=difference)
