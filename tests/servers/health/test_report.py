"""What is said of a swarm, from records and answers alone."""

from typing import Any

import msgspec

from petals_tune.wire.records import ServerRecord, Throughput
from petals_tune.wire.span import BlockSpan
from servers.health.report import Answer, Report, report
from servers.health.table import format_table

WELL = Answer(latency_s=0.0125)


def server(peer: str, start: int, stop: int, rate: float = 120.0, **fields: Any) -> ServerRecord:
    given = {"model": "digest", "model_name": "tiny", "total_blocks": 8, "quantization": "int8", "dtype": "float32"}
    speed = Throughput(step=rate, batch=rate)
    spoken = {"peer": peer, "addresses": (), "blocks": BlockSpan(start, stop), "throughput": speed}
    return ServerRecord(**{**given, **spoken, **fields})


def test_a_covered_swarm():
    seen = report([server("a", 0, 4), server("b", 2, 8, 60)], {"a": WELL, "b": WELL}, now_unix_s=5)
    (model,) = seen.models
    assert model.block_tokens_per_s == (30, 30, 40, 40, 10, 10, 10, 10)
    assert model.block_servers == (1, 1, 2, 2, 1, 1, 1, 1)
    assert not model.uncovered
    assert seen.is_whole


def test_who_does_not_answer_or_still_loads_covers_nothing():
    records = [server("a", 0, 4), server("b", 4, 6), server("c", 6, 8, state="joining")]
    seen = report(records, {"a": WELL, "b": Answer(problem="it fell silent")}, now_unix_s=5)
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
    seen = report(records, dict.fromkeys("abc", WELL), now_unix_s=5)
    assert [[each.peer for each in model.servers] for model in seen.models] == [["a", "c"], ["b"]]
    assert seen.models[0].digest == "digest.weights"


def test_an_empty_swarm_is_not_whole():
    seen = report([], {}, now_unix_s=5)
    assert not seen.is_whole
    assert format_table(seen) == "no server is announced in this swarm"


def test_a_report_is_json_and_back():
    seen = report([server("a", 0, 4, free_cache_bytes=7)], {"a": WELL}, now_unix_s=5)
    assert msgspec.json.decode(msgspec.json.encode(seen), type=Report) == seen


def test_the_table():
    records = [
        server("peer-of-anna", 0, 4, public_name="anna", version="0.1.0", free_cache_bytes=2**29),
        server("peer-of-otto", 4, 7, public_name="o\x1b[2Jtto"),
    ]
    text = format_table(report(records, {"peer-of-anna": WELL}, now_unix_s=5))
    lines = text.splitlines()
    assert lines[0] == "tiny: 8 blocks, 2 servers, slowest block 0 tokens/s"
    expected = "####.... anna ..f-anna 0:4 online 30 int8 float32 0.1.0 0.50 GB 12.5 ms"
    assert lines[2].split() == expected.split()
    assert lines[3].startswith("....???.  o?[2Jtto ..f-otto"), "no control character of a stranger reaches the terminal"
    assert lines[-1] == "UNCOVERED: no server answers for blocks 4:8"
    assert "\x1b" not in text
    coloured = format_table(report(records, {}, now_unix_s=5), coloured=True)
    assert coloured.endswith("\x1b[31mUNCOVERED: no server answers for blocks 0:8\x1b[0m")


def test_many_blocks_share_a_character_and_a_small_span_is_still_seen():
    seen = report([server("a", 99, 100, total_blocks=100)], {"a": WELL}, now_unix_s=5)
    picture = format_table(seen).splitlines()[2].split()[0]
    assert picture == "." * 47 + "#"
