import itertools

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from petals_tune.errors import ConfigError
from petals_tune.wire.span import BlockSpan, gaps
from tests.raising import raises

spans = st.tuples(st.integers(0, 40), st.integers(1, 12)).map(lambda pair: BlockSpan(pair[0], pair[0] + pair[1]))


@pytest.mark.parametrize(("text", "span"), [("0:12", BlockSpan(0, 12)), ("12:24", BlockSpan(12, 24))])
def test_a_span_is_read_from_text_and_written_back(text, span):
    assert BlockSpan.parse(text) == span
    assert str(span) == text
    assert len(span) == span.stop - span.start


@pytest.mark.parametrize("text", ["", "3", "3:", ":3", "a:b", "0:1:2", "-1:3", "3:3", "5:2", "1.5:2", None, True, 2.5])
def test_what_is_no_span_is_refused_naming_the_key(text):
    with raises(ConfigError, key="swarm.spans", seen=text):
        BlockSpan.parse(text, key="swarm.spans")


@pytest.mark.parametrize("load", [OmegaConf.create, yaml.safe_load], ids=["omegaconf", "pyyaml"])
@pytest.mark.parametrize(("written", "number"), [("12:24", 744), ("15:30", 930)])
def test_an_unquoted_span_in_a_yaml_file_is_a_number_and_refused_with_that_reason(load, written, number):
    read = load(f"blocks: {written}\n")["blocks"]
    assert read == number
    with raises(ConfigError, key="blocks", seen=number) as caught:
        BlockSpan.parse(read)
    assert f'blocks: "{written}"' in str(caught.value), "what to write"


@pytest.mark.parametrize("load", [OmegaConf.create, yaml.safe_load], ids=["omegaconf", "pyyaml"])
@pytest.mark.parametrize("written", ["'12:24'", '"12:24"'])
def test_a_quoted_span_in_a_yaml_file_is_one(load, written):
    assert BlockSpan.parse(load(f"blocks: {written}\n")["blocks"]) == BlockSpan(12, 24)


@pytest.mark.parametrize("argument", ["blocks=12:24", "blocks='12:24'", 'blocks="12:24"'])
def test_a_span_on_the_command_line_is_one_however_it_is_quoted(argument):
    override = OverridesParser.create().parse_override(argument)
    assert BlockSpan.parse(override.value()) == BlockSpan(12, 24)


@given(spans, spans)
def test_covering_is_containing_every_block(outer, inner):
    assert outer.covers(inner) == all(block in outer for block in range(inner.start, inner.stop))


@given(st.lists(spans, max_size=8), spans)
def test_gaps_are_exactly_the_blocks_that_no_span_holds(held, wanted):
    found = gaps(held, wanted)
    missing = [block for block in range(wanted.start, wanted.stop) if not any(block in span for span in held)]
    assert [block for span in found for block in range(span.start, span.stop)] == missing
    assert all(left.stop < right.start for left, right in itertools.pairwise(found)), "whole gaps, in order"
