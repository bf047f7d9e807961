"""What is said of a swarm, from records and answers alone."""

import msgspec

from petals_tune.wire.span import BlockSpan
from servers.health.report import Answer, Report
from tests.servers.health.records import WELL, report_of, server


def test_a_covered_swarm():
    seen = report_of([server("a", 0, 4), server("b", 2, 8, 60)], {"a": WELL, "b": WELL}, now_unix_s=5)
    (model,) = seen.models
    assert model.block_tokens_per_s == (30, 30, 40, 40, 10, 10, 10, 10)
    assert model.block_servers == (1, 1, 2, 2, 1, 1, 1, 1)
    assert not model.uncovered
    assert seen.is_whole


def test_who_does_not_answer_or_still_loads_covers_nothing():
    records = [server("a", 0, 4), server("b", 4, 6), server("c", 6, 8, state="joining")]
    seen = report_of(records, {"a": WELL, "b": Answer(problem="it fell silent")}, now_unix_s=5)
    (model,) = seen.models
    assert [(each.state, each.problem) for each in model.servers] == [
        ("online", ""),
        ("silent", "it fell silent"),
        ("joining", ""),
    ]
    assert model.uncovered == (BlockSpan(4, 8),)
    assert model.block_servers[4:] == (0, 0, 0, 0)
    assert not seen.is_whole


def test_another_model_in_the_swarm_shows_and_does_not_count_for_the_first():
    """A digest that also names the weights is of the same model."""
    records = [server("a", 0, 4), server("b", 0, 8, model="other"), server("c", 4, 8, model="digest.weights")]
    seen = report_of(records, dict.fromkeys("abc", WELL), now_unix_s=5)
    assert [[each.peer for each in model.servers] for model in seen.models] == [["a", "c"], ["b"]]
    assert seen.models[0].digest == "digest.weights"


def test_an_empty_swarm_is_not_whole():
    seen = report_of([], {}, now_unix_s=5)
    assert not seen.is_whole


def test_a_report_is_json_and_back():
    seen = report_of([server("a", 0, 4, free_cache_bytes=7)], {"a": WELL}, now_unix_s=5)
    assert msgspec.json.decode(msgspec.json.encode(seen), type=Report) == seen
