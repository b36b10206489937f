"""Sessions and leases: they end when they should, and with their owner."""

import pytest

from cachetier.core.errors import ProtocolError
from cachetier.store.leases import SESSION_LEASE_TIMES, SESSIONS_MAX, LeaseTable

TTL_S = 10.0


@pytest.fixture
def table():
    table = LeaseTable(TTL_S)
    yield table
    table.check_integrity()


def test_a_lease_expires_unless_it_is_renewed(table):
    session = table.open_session("worker", "engine", 1, 0.0)
    first, second = table.grant(session, [], 0.0), table.grant(session, [], 1.0)
    assert table.expire(9.9) == []
    assert table.renew(session, [first.id], 9.9) == []
    assert table.expire(11.0) == [second]
    assert table.renew(session, [first.id, second.id], 12.0) == [second.id]
    assert table.expire(21.9) == []
    assert table.expire(22.0) == [first]
    assert table.num_leases == 0


def test_leases_die_with_their_session_and_no_other_session_can_name_them(table):
    owner, other = (table.open_session("worker", "engine", pid, 0.0) for pid in (1, 2))
    lease = table.grant(owner, [], 0.0)
    assert table.get(other, lease.id) is None
    assert table.renew(other, [lease.id], 1.0) == [lease.id]
    assert table.get(owner, lease.id) is lease
    assert table.close_session(owner.id) == [lease]
    assert table.num_leases == 0
    assert table.close_session(owner.id) == []
    with pytest.raises(ProtocolError) as caught:
        table.session(owner.id, 1.0)
    assert caught.value.status == 404


def test_a_silent_session_ends_and_takes_its_leases_along(table):
    silent, alive = (table.open_session("worker", "engine", pid, 0.0) for pid in (1, 2))
    end = SESSION_LEASE_TIMES * TTL_S
    table.grant(silent, [], end - 1)
    table.session(alive.id, end - 1)
    assert len(table.expire(end)) == 1
    assert table.num_sessions == 1
    table.session(alive.id, end)


def test_sessions_are_limited(table):
    for pid in range(SESSIONS_MAX):
        table.open_session("worker", "engine", pid, 0.0)
    with pytest.raises(ProtocolError) as caught:
        table.open_session("worker", "engine", 0, 0.0)
    assert caught.value.status == 409


def test_ids_of_another_run_mean_nothing():
    first, second = LeaseTable(TTL_S), LeaseTable(TTL_S)
    session = first.open_session("worker", "engine", 1, 0.0)
    second.open_session("worker", "engine", 1, 0.0)
    with pytest.raises(ProtocolError):
        second.session(session.id, 0.0)
