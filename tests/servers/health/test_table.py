from servers.health.report import Answer
from servers.health.table import format_table
from tests.servers.health.records import WELL, report_of, server


def test_an_empty_swarm_is_one_sentence():
    assert format_table(report_of([], {}, now_unix_s=5)) == "no server is announced in this network"


def test_the_table():
    records = [
        server("peer-of-anna", 0, 4, public_name="anna", version="0.1.0", free_cache_bytes=2**29),
        server("peer-of-otto", 4, 7, public_name="otto"),
    ]
    text = format_table(
        report_of(records, {"peer-of-anna": WELL, "peer-of-otto": Answer(problem="gone")}, now_unix_s=5)
    )
    lines = text.splitlines()
    assert lines[0] == "tiny: 8 blocks, 2 servers, slowest block 0 tokens/s"
    expected = "####.... anna ..f-anna 0:4 online 30 int8 float32 cpu 0.1.0 0.50 GB 12.5 ms"
    assert lines[2].split() == expected.split()
    assert lines[3].startswith("....???.  otto ..f-otto")
    assert lines[4] == "f-otto is silent: gone"
    assert lines[-1] == "UNCOVERED: no server answers for blocks 4:8"
    assert "\x1b" not in text
    coloured = format_table(report_of(records, {}, now_unix_s=5), coloured=True)
    assert coloured.endswith("\x1b[31mUNCOVERED: no server answers for blocks 0:8\x1b[0m")


def test_many_blocks_share_a_character_and_a_small_span_is_still_seen():
    seen = report_of([server("a", 99, 100, total_blocks=100)], {"a": WELL}, now_unix_s=5)
    picture = format_table(seen).splitlines()[2].split()[0]
    assert picture == "." * 47 + "#"
