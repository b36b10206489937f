"""Runs that share a lane: none waits for the device in the others' way, and none takes all of it."""

import threading

import pytest

from cachetier_connector.cuda import staging
from cachetier_connector.cuda.staging import Lane, Turns
from tests.connector.cuda.host_device import HostDevice, HostEvent


@pytest.fixture
def host() -> HostDevice:
    return HostDevice()


@pytest.fixture
def lane(host, monkeypatch) -> Lane:
    monkeypatch.setattr(staging, "NUM_AHEAD", 8)
    return Lane(host, host.empty(2 * 8192), is_urgent=True)


def use_one(turns: Turns, lane: Lane, settled: list[int], number: int) -> None:
    with turns:
        use = turns.begin()
        digests = use.digests(1, 2)
        lane.kernels.enqueue(lambda: digests.fill_(number))
        turns.end(use, lane.kernels, lambda computed: settled.append(int.from_bytes(computed[8:], "little")))


def test_every_use_is_settled_once_in_order_with_its_own_digests(lane):
    turns, settled = Turns(lane), []
    for number in range(50):
        use_one(turns, lane, settled, number)
    turns.wait()
    assert settled == list(range(50))
    assert turns.num_pending == 0


def test_a_run_leaves_the_others_their_share(lane, host, monkeypatch):
    first, second, settled = Turns(lane), Turns(lane), []
    waits = []
    monkeypatch.setattr(
        HostEvent, "synchronize", lambda event, real=HostEvent.synchronize: (waits.append(event), real(event))
    )
    for number in range(4):
        use_one(first, lane, settled, number)
    assert not waits
    use_one(first, lane, settled, 4)
    assert waits, "the rest is the second one's"
    waits.clear()
    for number in range(4):
        use_one(second, lane, settled, number)
    assert not waits
    first.wait()
    first.close()
    second.wait()
    waits.clear()
    for number in range(8):
        use_one(second, lane, settled, number)
    assert not waits, "all is the last one's"


def test_nobody_holds_the_lane_while_it_waits_for_the_device(lane, monkeypatch):
    was_held = []

    def synchronize(event: HostEvent, real=HostEvent.synchronize) -> None:
        was_held.append(lane._lock.locked())
        real(event)

    monkeypatch.setattr(HostEvent, "synchronize", synchronize)
    turns, settled = Turns(lane), []
    for number in range(20):
        use_one(turns, lane, settled, number)
    turns.wait()
    assert len(was_held) > 1
    assert not any(was_held)


def test_one_wait_for_room_makes_room_for_more_than_one(lane, monkeypatch):
    waits, turns, settled = [], Turns(lane), []
    monkeypatch.setattr(
        HostEvent, "synchronize", lambda event, real=HostEvent.synchronize: (waits.append(event), real(event))
    )
    for number in range(48):
        use_one(turns, lane, settled, number)
    assert 0 < len(waits) <= 14  # of the 40 uses that find no room


def test_what_a_run_gave_up_is_not_settled_and_its_uses_are_free_again(lane):
    turns, settled = Turns(lane), []
    for number in range(5):
        use_one(turns, lane, settled, number)
    turns.give_up()
    turns.close()
    assert not settled
    assert len(lane._free) == 8


def test_runs_on_threads_all_come_to_their_end(lane):
    found: list[list[int]] = [[], [], []]

    def run(mine: list[int]) -> None:
        turns = Turns(lane)
        for number in range(100):
            use_one(turns, lane, mine, number)
        turns.wait()
        turns.close()

    threads = [threading.Thread(target=run, args=(mine,)) for mine in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [list(range(100))] * 3
