"""Calls that may hang: callers wait as long as they want to, and threads are bounded."""

import threading
import time

import pytest

from cachetier.store.call_pool import CallPool


@pytest.fixture
def pool():
    pool = CallPool("test", 2)
    yield pool
    pool.stop()


@pytest.fixture
def gate():
    gate = threading.Event()
    yield gate
    gate.set()


def num_threads():
    return sum(thread.name.startswith("cachetier-test-") for thread in threading.enumerate())


def eventually(is_true):
    deadline = time.monotonic() + 5
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_answer_in_time_is_returned_and_one_thread_is_enough_for_one_after_the_other(pool):
    assert [pool.call(lambda number=number: number, 5) for number in range(10)] == list(range(10))
    assert num_threads() == 1


def test_a_late_answer_is_none_after_the_callers_patience(pool, gate):
    start = time.monotonic()
    assert pool.call(gate.wait, 0.05) is None
    assert 0.05 <= time.monotonic() - start < 1


def test_when_all_threads_hang_calls_are_refused_at_once_and_again_answered_when_they_are_back(pool, gate):
    assert [pool.call(gate.wait, 0.01) for _ in range(2)] == [None, None]
    start = time.monotonic()
    assert pool.call(lambda: 1, 5) is None
    assert time.monotonic() - start < 0.5
    assert num_threads() == 2
    gate.set()
    eventually(lambda: pool.call(lambda: 1, 5) == 1)


def test_a_call_that_raises_is_none_and_harms_no_other(pool, caplog):
    assert pool.call(lambda: 1 // 0, 5) is None
    assert "ZeroDivisionError" in caplog.text
    assert pool.call(lambda: 1, 5) == 1


def test_stopping_ends_the_threads(pool):
    pool.call(lambda: 1, 5)
    pool.stop()
    eventually(lambda: num_threads() == 0)
