"""Versions of an adapter on a slow line: 8-bit differences whose roundings do not add up."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import torch

from petals_tune.swarm.versions import KEPT, AdapterVersions
from petals_tune.wire.adapter import AdapterPart, AdapterVersion, add_difference
from petals_tune.wire.codec import decode, encode
from petals_tune.wire.messages import PutAdapter
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import encoded_bytes

LEARNING_RATE = 1e-2


def trained(steps: int) -> list[AdapterVersion]:
    """An adapter after each of so many optimizer steps of LEARNING_RATE; the second tensor starts from zero."""
    torch.manual_seed(0)
    tensors, found = [torch.randn(8, 100), torch.zeros(40, 8)], []
    for number in range(steps):
        parts = (AdapterPart(block=1, method="lora", module="mlp", tensors=[each.clone() for each in tensors]),)
        found.append(AdapterVersion(version=f"v{number}", parts=parts))
        for each in tensors:
            each += LEARNING_RATE * torch.rand_like(each).sub_(0.3).sign_() * torch.rand_like(each)
    return found


def test_servers_stay_within_half_a_step_of_8_bits_of_one_change_however_long_the_training():
    versions, names = AdapterVersions(), set()
    for number, exact in enumerate(trained(200)):
        sent = versions.next(exact)
        names.add(sent.version)
        assert (sent.difference is None) == (number == 0)
        for near, tensor in zip(sent.parts[0].tensors, exact.parts[0].tensors, strict=True):
            assert (near - tensor).abs().max() <= 1.1 * LEARNING_RATE / 127 / 2 * 1.02
    assert len(names) == 200


def test_a_server_adds_a_difference_to_the_same_bits():
    versions = AdapterVersions()
    held = None
    for exact in trained(5):
        sent = versions.next(exact)
        if sent.difference is None:
            held = list(sent.parts)
            continue
        assert held is not None
        put = PutAdapter(
            version=sent.version, span=BlockSpan(0, 2), base=sent.difference.base, parts=list(sent.difference.parts)
        )
        assert sum(encoded_bytes(t) for t in put.parts[0].tensors) < 0.3 * sum(t.nbytes for t in sent.parts[0].tensors)
        arrived = decode(encode(put))
        assert isinstance(arrived, PutAdapter)
        held = add_difference(held, arrived.parts)
        assert all(map(torch.equal, held[0].tensors, sent.parts[0].tensors))


def test_a_version_that_was_sent_before_is_the_same_one_again():
    versions, (first, second) = AdapterVersions(), trained(2)
    assert versions.next(first) is first
    sent = versions.next(second)
    assert versions.next(first) is first
    assert versions.next(second) is sent


def test_servers_drop_the_version_that_was_sent_for_the_same_tensors_before_and_no_other():
    versions, steps = AdapterVersions(), trained(4)
    first, second = (versions.next(each) for each in (steps[0], replace(steps[1], replaces=steps[0].version)))
    assert second.replaces == first.version
    third = versions.next(replace(steps[2], replaces=steps[1].version))
    assert third.replaces == second.version != steps[1].version, "by the name that servers know"
    like_it = versions.next(steps[3])
    assert like_it.difference is not None, "near a version that is still needed"
    assert like_it.replaces is None


def test_another_adapter_is_sent_whole():
    versions, (first, *_) = AdapterVersions(), trained(1)
    versions.next(first)
    (part,) = first.parts
    for changed in (
        msgspec.structs.replace(part, scaling=2.0),
        msgspec.structs.replace(part, block=0),
        msgspec.structs.replace(part, tensors=[torch.randn(8, 100) * 0.1, part.tensors[1]]),
        msgspec.structs.replace(part, tensors=[part.tensors[0], torch.full((40, 8), torch.nan)]),
        msgspec.structs.replace(part, tensors=[torch.ones(4, 100), part.tensors[1]]),
    ):
        other = AdapterVersion(version=f"{changed.frame} {changed.tensors}", parts=(changed,))
        assert AdapterVersions().next(other) is versions.next(other) is other
    assert len(versions._sent) == 6 <= KEPT
