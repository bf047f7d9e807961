from petals_tune.net.stats import ServerTimes, SwarmStats


def test_answers_are_counted_for_all_servers_and_for_each():
    stats = SwarmStats()
    for peer, reply_s in (("a", 1.0), ("b", 2.0), ("a", 0.5)):
        stats.answered(peer, reply_s)
    assert stats.calls == 3
    assert stats.servers == {"a": ServerTimes(calls=2, reply_s=1.5), "b": ServerTimes(calls=1, reply_s=2.0)}
