from petals_tune.swarm.routes.bans import FIRST_BAN_S, LONGEST_BAN_S, NOT_FINITE_S, OFFENCE_S, Bans


def test_a_ban_lasts_until_its_end_and_then_until_the_server_was_reached():
    bans = Bans()
    bans.failed("a", 100.0)
    before, after = 100.0 + FIRST_BAN_S - 0.1, 100.0 + FIRST_BAN_S
    assert (bans.active(before), bans.doubtful(before)) == ({"a"}, frozenset())
    assert (bans.active(after), bans.doubtful(after)) == ({"a"}, {"a"})
    bans.reached("a")
    assert bans.active(after) == frozenset()


def test_requests_that_fail_together_are_one_failure_and_each_further_one_doubles_the_ban():
    bans = Bans()
    for _ in range(8):
        bans.failed("a", 100.0)
    assert bans.doubtful(100.0 + FIRST_BAN_S) == {"a"}
    bans.failed("a", 200.0)
    assert bans.doubtful(200.0 + 2 * FIRST_BAN_S - 0.1) == frozenset()
    assert bans.doubtful(200.0 + 2 * FIRST_BAN_S) == {"a"}


def test_a_ban_is_never_longer_than_the_longest():
    bans = Bans()
    for number in range(2000):
        bans.failed("a", 1000.0 * number)
    assert bans.doubtful(1_999_000.0 + LONGEST_BAN_S - 0.1) == frozenset()
    assert bans.doubtful(1_999_000.0 + LONGEST_BAN_S) == {"a"}


def test_an_answer_ends_a_ban_and_forgets_the_failures():
    bans = Bans()
    bans.failed("a", 0.0)
    bans.failed("a", 10.0)
    bans.failed("b", 0.0)
    bans.answered("a")
    bans.answered("never seen")
    assert bans.active(1.0) == {"b"}
    bans.failed("a", 100.0)
    assert bans.doubtful(100.0 + FIRST_BAN_S) == {"a", "b"}


def test_wrong_numbers_are_not_forgotten_for_an_answer():
    bans = Bans()
    bans.offended("liar", 0.0)
    bans.not_finite("nan", 0.0)
    for peer in ("liar", "nan"):
        bans.answered(peer)
        bans.reached(peer)
    assert bans.active(1.0) == {"liar", "nan"}
    bans.failed("gone", 0.0)
    assert bans.wrong(1.0) == {"liar", "nan"}
    bans.answered("gone")
    assert bans.offenders(1.0) == {"liar"}, "the other one is asked where there is nobody else"
    assert bans.active(NOT_FINITE_S) == {"liar"}
    assert bans.active(OFFENCE_S) == frozenset()
