"""The breaker: when it lets calls through, and how often it probes."""

import time

import pytest

from cachetier.store import breaker as module
from cachetier.store.breaker import Breaker


class Store:
    """Answers probes or does not; notes when it was probed and what the breaker told."""

    def __init__(self) -> None:
        self.answers = True
        self.probes: list[float] = []
        self.told: list[bool] = []
        self.breaker = Breaker(self._probe, self.told.append)
        self.breaker.start()

    def _probe(self) -> bool:
        self.probes.append(time.monotonic())
        return self.answers

    def wait(self, *, is_open: bool) -> None:
        deadline = time.monotonic() + 5
        while self.breaker.is_open is not is_open:
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(module, "PROBE_INTERVAL_S", 0.05)
    store = Store()
    store.wait(is_open=False)
    yield store
    store.breaker.stop()


def test_it_begins_open_and_closes_with_the_first_answer(store):
    assert len(store.probes) == 1
    assert store.told == [False]


def test_a_failure_opens_it_once_and_the_first_probe_comes_an_interval_later(store):
    failed_at = time.monotonic()
    for _ in range(5):
        store.breaker.fail()
    assert store.breaker.is_open
    store.wait(is_open=False)
    assert store.probes[-1] - failed_at >= 0.05
    assert store.told == [False, True, False]


def test_it_stays_open_while_probes_fail(store):
    store.answers = False
    store.breaker.fail()
    time.sleep(0.3)
    assert store.breaker.is_open
    assert 3 <= len(store.probes) <= 7
    store.answers = True
    store.wait(is_open=False)


def test_a_store_that_only_answers_probes_is_probed_less_and_less_often(store):
    waits = []
    for _ in range(4):
        failed_at = time.monotonic()
        store.breaker.fail()
        store.wait(is_open=False)
        waits.append(store.probes[-1] - failed_at)
    assert [wait >= 0.05 * 2**number for number, wait in enumerate(waits)] == [True] * 4


def test_a_store_that_was_fine_for_a_while_is_probed_as_at_first(store, monkeypatch):
    for _ in range(3):
        store.breaker.fail()
        store.wait(is_open=False)
    monkeypatch.setattr(module, "RELAPSE_S", 0.0)
    failed_at = time.monotonic()
    store.breaker.fail()
    store.wait(is_open=False)
    assert store.probes[-1] - failed_at < 0.15


def test_stopping_ends_its_thread(store):
    store.breaker.stop()
    store.breaker._thread.join(5)
    assert not store.breaker._thread.is_alive()
