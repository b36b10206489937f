"""Promises: whose word counts for a chunk, and how long."""

import pytest

from cachetier.core.keys import ChainKey
from cachetier.store import promises as promises_module
from cachetier.store.leases import Session
from cachetier.store.promises import PROMISE_TTL_S, PromiseTable

KEYS = [ChainKey(bytes([number]) * 16) for number in range(6)]


def session(number: int, engine: str) -> Session:
    return Session(number, "scheduler", engine, 1)


@pytest.fixture
def table():
    table = PromiseTable()
    yield table
    table.check_integrity()


def promised(table, by: str = "reader") -> list[int]:
    """Return the numbers of the chunks that an engine may count on."""
    return [number for number, key in enumerate(KEYS) if table.is_made(key, not_by=by)]


def test_a_promise_is_for_other_engines_and_ends_chunk_by_chunk(table):
    assert table.make(session(1, "a"), KEYS[1:4], 1, now=0.0)
    assert promised(table) == [1, 2, 3]
    assert promised(table, by="a") == []
    table.settle(KEYS[2])
    assert promised(table) == [1, 3]


def test_what_was_handed_over_stays_promised_for_as_long_as_storing_takes(table):
    promise = table.make(session(1, "a"), KEYS[2:], 2, now=0.0)
    table.end(1, promise, num_chunks=4, ends_at=3.0)
    assert promised(table) == [2, 3]
    table.expire(2.9, lambda _: True)
    assert promised(table) == [2, 3]
    table.expire(3.0, lambda _: True)
    assert promised(table) == []


@pytest.mark.parametrize("num_chunks", [0, 2, -1])
def test_a_promise_of_which_nothing_was_handed_over_ends_at_once(table, num_chunks):
    promise = table.make(session(1, "a"), KEYS[2:], 2, now=0.0)
    table.end(1, promise, num_chunks, ends_at=3.0)
    assert promised(table) == []


def test_only_its_session_ends_a_promise_and_it_ends_with_that(table):
    promise = table.make(session(1, "a"), KEYS[:2], 0, now=0.0)
    table.make(session(2, "b"), KEYS[4:], 4, now=0.0)
    table.end(2, promise, 0, ends_at=0.0)
    table.end(1, promise + 100, 0, ends_at=0.0)
    table.end_session(2)
    assert promised(table) == [0, 1]
    table.expire(1.0, lambda number: number != 1)
    assert promised(table) == []


def test_the_later_of_two_promises_counts(table):
    table.make(session(1, "a"), KEYS[:3], 0, now=0.0)
    table.make(session(2, "b"), KEYS[:2], 0, now=0.0)
    table.end_session(1)
    assert promised(table) == [0, 1]
    table.end_session(2)
    assert promised(table) == []


def test_a_promise_that_nobody_ends_ends_some_day(table):
    table.make(session(1, "a"), KEYS, 0, now=5.0)
    table.expire(PROMISE_TTL_S, lambda _: True)
    assert promised(table)
    table.expire(5 + PROMISE_TTL_S, lambda _: True)
    assert promised(table) == []


def test_there_is_a_most_of_what_is_promised(table, monkeypatch):
    monkeypatch.setattr(promises_module, "KEYS_MAX", 4)
    first = table.make(session(1, "a"), KEYS[:3], 0, now=0.0)
    assert table.make(session(2, "b"), KEYS[3:5], 3, now=0.0) == 0
    assert table.make(session(2, "b"), [], 3, now=0.0) == 0
    table.end(1, first, 1, ends_at=9.0)
    assert table.make(session(2, "b"), KEYS[3:5], 3, now=0.0)
    assert promised(table) == [0, 3, 4]
