"""Who computes next: no clock, no threads."""

import pytest

from servers.scheduling.fair_queue import STEP_SHARE, FairQueue, FairScheduler, Priority

STEP_S, BATCH_S = 0.02, 1.0


class Server:
    """Works off a queue in made-up time."""

    def __init__(self) -> None:
        self.queue: FairQueue[tuple[str, float]] = FairQueue()
        self.now_s = 0.0
        self.spent: dict[str, float] = {}

    def push(self, priority: Priority, client: str, elapsed_s: float, name: str = "") -> None:
        self.queue.push(priority, client, (name or client, elapsed_s))

    def run(self) -> str:
        name, elapsed_s = self.queue.pop()
        self.now_s += elapsed_s
        self.spent[name] = self.spent.get(name, 0.0) + elapsed_s
        self.queue.charge(elapsed_s)
        return name


@pytest.fixture
def server() -> Server:
    return Server()


def test_of_one_client_a_backward_goes_before_a_forward_and_the_older_first(server):
    for number, priority in enumerate([Priority.FORWARD, Priority.FORWARD, Priority.BACKWARD, Priority.BACKWARD]):
        server.push(priority, "anna", 1.0, name=str(number))
    assert [server.run() for _ in range(4)] == ["2", "3", "0", "1"]
    with pytest.raises(IndexError):
        server.queue.pop()


def test_a_step_waits_for_one_batch_at_most(server):
    """However many wait, and however long they have."""
    for _ in range(50):
        server.push(Priority.FORWARD, "trainer", BATCH_S)
    for _ in range(10):
        server.run()
        server.push(Priority.STEP, "chatter", STEP_S)
        assert server.run() == "chatter"


def test_endless_steps_leave_batches_their_share(server):
    server.push(Priority.FORWARD, "trainer", BATCH_S)
    server.push(Priority.STEP, "chatter", STEP_S)
    while server.now_s < 200:
        ran = server.run()
        server.push(
            Priority.STEP if ran == "chatter" else Priority.FORWARD, ran, STEP_S if ran == "chatter" else BATCH_S
        )
    assert server.spent["chatter"] / server.now_s == pytest.approx(STEP_SHARE, abs=0.02)


def test_a_client_with_many_requests_does_not_starve_others(server):
    for _ in range(32):
        server.push(Priority.FORWARD, "greedy", BATCH_S)
    server.run()
    server.push(Priority.FORWARD, "modest", BATCH_S)
    server.push(Priority.FORWARD, "other", BATCH_S)
    assert {server.run(), server.run()} == {"modest", "other"}
    assert server.run() == "greedy"


def test_clients_get_equal_seconds_not_equal_requests(server):
    for client, elapsed_s in (("large", 4.0), ("small", 0.5)):
        for _ in range(300):
            server.push(Priority.FORWARD, client, elapsed_s)
    while server.now_s < 100:
        server.run()
    assert server.spent["large"] == pytest.approx(server.spent["small"], abs=4.0)


def test_a_flood_of_backwards_does_not_starve_another_clients_forward(server):
    for _ in range(20):
        server.push(Priority.BACKWARD, "flood", BATCH_S)
    server.run()
    server.push(Priority.FORWARD, "new", BATCH_S)
    assert server.run() == "new"


def test_nothing_is_saved_up_by_being_idle(server):
    """Who comes after long shares with those who worked meanwhile; it does not get all of what it left to them."""
    server.push(Priority.FORWARD, "late", BATCH_S)
    for _ in range(300):
        server.push(Priority.FORWARD, "busy", BATCH_S)
    for _ in range(101):
        server.run()
    for _ in range(100):
        server.push(Priority.FORWARD, "late", BATCH_S)
    ran = [server.run() for _ in range(20)]
    assert ran.count("late") == pytest.approx(10, abs=1)


def test_newcomers_without_end_do_not_starve_who_stays_and_are_forgotten():
    scheduler: FairScheduler[str] = FairScheduler()
    chosen = []
    for number in range(1000):
        chosen.append(scheduler.choose([f"client {number}", "stays"]))
        scheduler.charge(1.0)
    assert chosen.count("stays") == pytest.approx(500, abs=200)
    assert len(scheduler) < 10


def test_the_length_is_what_waits(server):
    server.push(Priority.STEP, "a", 1.0)
    server.push(Priority.FORWARD, "a", 1.0)
    server.push(Priority.FORWARD, "b", 1.0)
    assert len(server.queue) == 3
    server.run()
    assert len(server.queue) == 2


def test_what_is_discarded_is_not_served_and_the_others_keep_their_order():
    queue: FairQueue[str] = FairQueue()
    for number in range(4):
        queue.push(Priority.FORWARD, "anna", str(number))
    queue.push(Priority.STEP, "anna", "step")
    assert queue.discard(Priority.FORWARD, "anna", "1")
    assert queue.discard(Priority.STEP, "anna", "step")
    assert not queue.discard(Priority.FORWARD, "anna", "1")
    assert not queue.discard(Priority.FORWARD, "bob", "1")
    assert [queue.pop() for _ in range(len(queue))] == ["0", "2", "3"]
