import pytest

from petals_tune.errors import AccessDenied, OverLimit, PetalsTuneError, ProtocolError, Refused, RequestRefused
from petals_tune.net.verdict import verdict


def refused(peer: str, said: PetalsTuneError) -> Refused:
    return Refused("no", peer=peer, said=said)


SIZE = RequestRefused("no", reason="hidden size")
A, B = refused("a", SIZE), refused("b", RequestRefused("no", reason="rows"))


def test_one_servers_word_is_not_final_where_others_are_there():
    assert verdict([], alone=True) is None
    assert verdict([A], alone=False) is None


def test_what_two_servers_say_is_and_names_both():
    final = verdict([A, refused("c", AccessDenied("no")), B], alone=False)
    assert type(final) is RequestRefused
    assert vars(final) == {"reason": "rows"}
    assert "servers a and b" in str(final)


@pytest.mark.parametrize(
    "other",
    [refused("b", ProtocolError("no")), refused("a", SIZE), OverLimit("no", peer="b", said=SIZE)],
    ids=["another error", "the same server", "one that takes less"],
)
def test_these_do_not_agree(other):
    assert verdict([A, other], alone=False) is None


def test_the_word_of_the_only_server_is_final_and_says_so():
    final = verdict([A], alone=True)
    assert type(final) is RequestRefused
    assert vars(final) == vars(SIZE)
    assert "only server a was there" in str(final)


def test_where_all_take_too_little_the_one_that_takes_most_speaks():
    less = [
        OverLimit("no", peer=peer, said=RequestRefused("no", limit="max_cache_gb", max_length=length))
        for peer, length in (("a", 10), ("b", 30), ("c", 20))
    ]
    assert verdict(less, alone=False) is None
    final = verdict(less, alone=True)
    assert isinstance(final, RequestRefused)
    assert (final.limit, final.max_length) == ("max_cache_gb", 30)
    assert "a and b and c" in str(final)
