"""What is written about the options is true."""

import re
from pathlib import Path

from omegaconf import OmegaConf

from petals_tune.blocks import memory
from petals_tune.config import composed
from petals_tune.errors import ConfigError
from petals_tune.net.direct.transport import DirectOptions
from tests.raising import raises
from tests.servers.hosting import options_of

TEXT = (Path(__file__).parents[2] / "docs" / "hosting.md").read_text()
ROWS = [
    line.split(" | ")
    for line in TEXT[TEXT.index("## Options of Petals servers") :].splitlines()
    if line.startswith("| `")
]


def test_every_option_that_stands_for_one_of_petals_exists():
    named = {name for row in ROWS for name in re.findall(r"`([a-z_.]+)=?`", row[1])}
    assert len(named) > 20
    cfg = composed(config_name="serve")
    assert sorted(name for name in named if OmegaConf.select(cfg, name, default="nowhere") == "nowhere") == []


def test_what_has_no_option_has_a_reason():
    reasons = [row for row in ROWS if row[1].strip() == "none"]
    assert len(reasons) > 5
    assert all(len(row[2].strip(" |")) > 5 for row in reasons)


def test_blocks_and_their_number_have_to_agree():
    options = options_of("blocks='0:3'", "num_blocks=4")
    with raises(ConfigError, key="num_blocks", seen=4):
        _ = options.span


def test_a_revision_is_an_option_beside_every_named_model():
    assert options_of().model.revision is None
    found = options_of("model=bloom-560m", "model.revision=c0ffee").model
    assert (found.source, found.revision) == ("bigscience/bloom-560m", "c0ffee")


def test_direct_connections_can_be_forwarded_and_turned_off():
    assert options_of().swarm.direct == DirectOptions()
    forwarded = options_of("swarm.direct_port=31338", "swarm.announce_direct_port=443").swarm.direct
    assert forwarded == DirectOptions(port=31338, announced_port=443)
    assert options_of("swarm.direct_port=null").swarm.direct is None


def test_several_devices_are_a_list():
    assert options_of("device=[cuda:0,cuda:1]").device == ["cuda:0", "cuda:1"]
    assert options_of("device=cuda:1").device == "cuda:1"
    assert options_of().device == "auto"


def test_without_numbers_requests_are_bounded_by_memory_alone():
    found = options_of().limits.of_requests(max_compute_bytes=1)
    assert (found.max_positions, found.max_tokens) == (None, None)
    assert found.max_receiving_bytes == memory.total_bytes("cpu") // 4
    assert found.max_message_bytes == found.max_receiving_bytes // 2, "what a client alone may have in flight"
    changed = ["max_positions=5", "max_tokens=6", "max_receiving_gb=1", "max_message_mb=3"]
    found = options_of(*(f"limits.{text}" for text in changed)).limits.of_requests(max_compute_bytes=1)
    assert (found.max_positions, found.max_tokens) == (5, 6)
    assert (found.max_receiving_bytes, found.max_message_bytes) == (2**30, 3 * 2**20)
