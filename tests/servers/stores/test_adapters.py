"""Uploaded adapters and sums of their gradients, by direct calls."""

import pytest
import torch

from petals_tune.errors import AdapterMissing, RequestRefused, ServerBusy
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.span import BlockSpan
from servers.stores.adapters import AdapterCache, GradientSums, sum_terms
from tests.raising import raises

SPAN = BlockSpan(0, 4)


def parts(*blocks: int, floats: int = 10) -> list[AdapterPart]:
    return [AdapterPart(block=block, method="prompt", tensors=[torch.zeros(floats)]) for block in blocks]


def cache(max_bytes: int = 400, **options: int) -> AdapterCache:
    return AdapterCache(max_bytes=max_bytes, **options)


def put(adapters: AdapterCache, client: str, version: str, parts: list[AdapterPart]) -> None:
    with adapters.room(client, version, SPAN, sum(tensor.nbytes for part in parts for tensor in part.tensors)):
        adapters.put(client, version, SPAN, parts)


def add(sums: GradientSums, client: str, sum_id: int, place: int, gradients: list[torch.Tensor]) -> None:
    with sums.room(client, sum_id, place, gradients):
        sums.add(client, sum_id, place, gradients)


def take(sums: GradientSums, client: str, sum_id: int) -> list[list[torch.Tensor]]:
    with sums.taken(client, sum_id) as terms:
        return terms


def test_an_adapter_is_its_clients_and_is_cut_to_the_blocks_that_are_asked_for():
    adapters = cache()
    put(adapters, "a", "v", parts(0, 1, 3))
    assert [part.block for part in adapters.get("a", "v", BlockSpan(1, 4)).parts] == [1, 3]
    assert all(tensor.requires_grad for tensor in adapters.get("a", "v", SPAN).tensors)
    for client, version, span in (("b", "v", SPAN), ("a", "w", SPAN), ("a", "v", BlockSpan(3, 5))):
        with raises(AdapterMissing):
            adapters.get(client, version, span)


def test_the_version_that_was_used_longest_ago_is_dropped_first():
    adapters = cache(max_bytes=100)
    for version in ("v1", "v2"):
        put(adapters, "a", version, parts(0))
    adapters.get("a", "v1", SPAN)
    put(adapters, "a", "v3", parts(0))
    for version in ("v1", "v3"):
        adapters.get("a", version, SPAN)
    with raises(AdapterMissing):
        adapters.get("a", "v2", SPAN)
    assert adapters.used_bytes == 2 * 40


def test_bytes_bound_how_many_versions_a_client_has():
    adapters = cache(max_bytes=32 * 40)
    versions = [f"v{number}" for number in range(32)]
    for version in versions:
        put(adapters, "a", version, parts(0))
    for version in versions:
        adapters.get("a", version, SPAN)
    put(adapters, "a", "one more", parts(0))
    assert [upload.version for upload in adapters.keys_of("a")] == [*versions[1:], "one more"]


def test_no_client_has_more_versions_than_a_store_has_values(monkeypatch):
    monkeypatch.setattr("servers.stores.adapters.MAX_VALUES", 2)
    adapters = cache()
    for version in ("v1", "v2", "v3"):
        put(adapters, "a", version, parts(0))
    assert [upload.version for upload in adapters.keys_of("a")] == ["v2", "v3"]


def test_an_adapter_that_is_trained_leaves_no_versions_behind():
    adapters = cache()
    put(adapters, "a", "another", parts(0))
    for number in range(3):
        with adapters.room("a", f"v{number}", SPAN, 40):
            adapters.put("a", f"v{number}", SPAN, parts(0), replaces=f"v{number - 1}")
    assert [upload.version for upload in adapters.keys_of("a")] == ["another", "v2"]
    with adapters.room("a", "v2", SPAN, 40):
        adapters.put("a", "v2", SPAN, parts(0), replaces="v2")
    assert [upload.version for upload in adapters.keys_of("a")] == ["another", "v2"]


def test_an_upload_that_comes_again_replaces_the_first():
    adapters = cache()
    for _ in range(3):
        put(adapters, "a", "v", parts(0, 1))
    assert (len(adapters), adapters.used_bytes) == (1, 80)


def test_a_clients_older_versions_make_room_and_those_of_others_only_beyond_their_share():
    adapters = cache(max_bytes=100)
    put(adapters, "a", "v1", parts(0))
    put(adapters, "b", "v1", parts(0))
    put(adapters, "a", "v2", parts(0))
    assert [(upload.version) for upload in adapters.keys_of("a")] == ["v2"]
    adapters.get("b", "v1", SPAN)
    with raises(ServerBusy, limit="max_adapter_gb"):
        put(adapters, "c", "v1", parts(0))
    with raises(RequestRefused, limit="max_adapter_gb"):
        put(adapters, "c", "v1", parts(0, 1, 2))
    assert adapters.used_bytes == 80


def term(value: float, size: int = 3) -> list[torch.Tensor]:
    return [torch.full((size,), value), torch.full((2, size), 10 * value)]


def test_a_sum_adds_its_terms_in_the_order_of_their_places_each_once():
    sums = GradientSums(max_bytes=10**4)
    for place in (2, 0, 1, 0):
        add(sums, "a", 7, place, term(float(place)))
    add(sums, "a", 8, 0, term(100.0))
    add(sums, "b", 7, 0, term(100.0))
    terms = take(sums, "a", 7)
    assert [each[0][0].item() for each in terms] == [0.0, 1.0, 2.0]
    first, second = sum_terms(terms)
    assert torch.equal(first, torch.full((3,), 3.0))
    assert torch.equal(second, torch.full((2, 3), 30.0))
    assert take(sums, "a", 7) == []
    assert len(sums) == 2


def test_half_precision_terms_are_summed_to_floats():
    (total,) = sum_terms([[torch.ones(2, dtype=torch.bfloat16)]] * 2)
    assert total.dtype is torch.float32
    assert sum_terms([]) == []


def test_terms_of_different_shapes_are_refused_and_the_sum_stays():
    sums = GradientSums(max_bytes=10**4)
    add(sums, "a", 1, 0, term(1.0))
    with raises(RequestRefused, reason="sum"):
        add(sums, "a", 1, 1, term(1.0, size=4))
    assert len(take(sums, "a", 1)) == 1


def test_sums_that_a_client_never_collects_are_dropped_the_oldest_first():
    sums = GradientSums(max_bytes=10**4, sums_per_client=2)
    for number in (5, 6, 7):
        for place in range(2):
            add(sums, "a", number, place, term(1.0))
    assert [len(take(sums, "a", number)) for number in (5, 6, 7)] == [0, 2, 2]


@pytest.mark.parametrize("client", ["a", "b"])
def test_a_term_without_room_is_refused_as_busy(client):
    sums = GradientSums(max_bytes=60)  # a term is 9 floats
    add(sums, "a", 1, 0, term(1.0))
    with raises(ServerBusy, limit="max_adapter_gb"):
        add(sums, client, 2, 0, term(1.0))
    assert sums.used_bytes == 36
