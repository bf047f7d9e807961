import hashlib
from pathlib import Path

import pytest

from petals_tune.data.chitchat import ChitChat
from petals_tune.data.questions import Questions
from petals_tune.data.source import (
    SplitShares,
    check_whole_number,
    corpus_file,
    digest_files,
    digest_of,
    hash_fraction,
)
from petals_tune.errors import ConfigError, DataError
from tests.raising import raises


def test_a_fraction_is_the_same_on_all_machines_and_spread_evenly() -> None:
    assert hash_fraction("ann") == int(hashlib.blake2b(b"ann", digest_size=6).hexdigest(), 16) / 16**12
    fractions = [hash_fraction(str(number)) for number in range(10_000)]
    assert all(0 <= fraction < 1 for fraction in fractions)
    assert sum(fraction < 0.2 for fraction in fractions) == pytest.approx(2000, abs=200)


def test_validation_is_at_the_lower_end_and_does_not_depend_on_the_share_of_the_test() -> None:
    for shares in (SplitShares(held_out_share=0.25), SplitShares(held_out_share=0.25, test_share=0.5)):
        assert [shares.split_of(fraction) for fraction in (0.0, 0.2499)] == ["validation"] * 2
        assert shares.split_of(0.25) == shares.split_of(0.4999) == "train"
    assert SplitShares(test_share=0.5).split_of(0.5) == "test"
    assert SplitShares(test_share=0.0).split_of(0.9999) == "train"


@pytest.mark.parametrize("shares", [(1.0, 0.0), (-0.1, 0.0), (0.1, -0.1), (0.5, 0.5)])
def test_shares_are_not_negative_and_leave_rows_for_training(shares: tuple[float, float]) -> None:
    with raises(ConfigError, key="data.source.held_out_share", seen=shares[0]):
        SplitShares(held_out_share=shares[0], test_share=shares[1])


def test_shares_in_words() -> None:
    assert SplitShares().format_shares("train is") == "10% of train is held out"
    both = SplitShares(held_out_share=0.15, test_share=0.05).format_shares("the people are")
    assert both == "15% of the people are held out, 5% kept for the test"
    assert SplitShares(held_out_share=0.0).format_shares("train is") == ""


@pytest.mark.parametrize("value", [0, 1.0, True, "2", None])
def test_a_whole_number_is_checked(value: object) -> None:
    assert check_whole_number("data.rows", 1, least=1) == 1
    with raises(ConfigError, key="data.rows", seen=value):
        check_whole_number("data.rows", value, least=1)  # type: ignore[arg-type]


def test_a_corpus_is_a_file_of_an_installed_package() -> None:
    assert corpus_file("petals_tune.data", "my_data.jsonl", requirement="petals_tune").stat().st_size > 0
    for package, name in (("petals_tune.data", "nothing.jsonl"), ("not_there", "rows.csv")):
        with raises(DataError, source="not-there==1"):
            corpus_file(package, name, requirement="not-there==1")


def test_the_digest_of_files_is_that_of_their_bytes_in_order(tmp_path: Path) -> None:
    a, b, same = (tmp_path / name for name in ("a", "b", "same"))
    for path, text in {a: "x", b: "y", same: "x"}.items():
        path.write_text(text)
    assert digest_files([a, b]) == digest_files([same, b]) != digest_files([b, a])
    with raises(DataError, source=tmp_path / "c"):
        digest_files([tmp_path / "c"])


def test_the_digest_of_a_corpus_is_of_its_file_and_its_options() -> None:
    sources = [ChitChat(), ChitChat(persona_lines=3), Questions(topics=["ai"]), Questions(topics=["money"])]
    assert len({digest_of(source) for source in sources}) == 4
    assert digest_of(sources[0]) == digest_of(ChitChat())
    assert digest_of(sources[2]) != digest_of(Questions(topics=["ai"], system="Answer."))
