"""The link: comes up by itself, and a server that is dead, stopped or replaced never holds its thread up."""

import os
import signal
import time

import pytest

from cachetier.core.errors import UnavailableError
from cachetier.core.messages import Match, Renew
from cachetier_connector import link as link_module
from cachetier_connector.link import ServerLink
from tests.connector.servers import LAYOUT, connect, eventually, identity, stats_of
from tests.service.running import RunningServer


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(link_module, "PROBE_INTERVAL_S", 0.1)
    monkeypatch.setattr(link_module, "CHECK_INTERVAL_S", 0.02)


def renew(link: ServerLink, timeout_s: float = 5.0):
    return link.call(lambda session: Renew(session=session, leases=[]), timeout_s)


def test_a_link_without_a_server_fails_calls_at_once_and_probes_rarely():
    asked = []

    def find_socket():
        asked.append(time.monotonic())
        return "/nowhere/socket"

    link = ServerLink("test", "engine", find_socket)
    assert not link.is_up
    assert renew(link) is None
    deadline_s = time.monotonic() + 0.35
    while time.monotonic() < deadline_s:
        assert not link.probe()
    assert 2 <= len(asked) <= 4
    with pytest.raises(UnavailableError):
        link.connect()


def test_a_link_whose_socket_is_not_known_yet_stays_down():
    link = ServerLink("test", "engine", lambda: "")
    assert not link.probe()
    assert not link.is_up


def test_a_link_opens_a_session_and_closes_it(server):
    before = stats_of(server)["sessions"]
    link = connect(server)
    assert link.is_up
    assert renew(link).expired == []
    assert stats_of(server)["sessions"] == before + 1
    link.close()
    assert not link.is_up
    assert eventually(lambda: stats_of(server)["sessions"] == before)


def test_a_refused_message_leaves_the_link_up(server):
    link = connect(server)
    assert link.call(lambda session: Match(session=session, namespace=b"?", tokens=b"123"), 5.0) is None or link.is_up
    link.close()


def test_a_stopped_server_costs_one_deadline_and_comes_back(server):
    link = connect(server)
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        since = time.monotonic()
        assert renew(link, 0.1) is None
        assert time.monotonic() - since < 0.5
        assert not link.is_up
        since = time.monotonic()
        assert renew(link) is None  # the breaker is open: at once
        assert not link.probe()
        assert time.monotonic() - since < 0.05
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    assert eventually(link.probe)
    assert renew(link) is not None
    link.close()


def test_a_probe_of_a_stopped_server_ends(server, monkeypatch):
    monkeypatch.setattr(link_module, "PROBE_TIMEOUT_S", 0.1)
    link = ServerLink("test", "engine", lambda: server.socket_path)
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        since = time.monotonic()
        assert not link.probe()
        assert time.monotonic() - since < 0.5
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    assert eventually(link.probe)
    link.close()


def test_a_replaced_server_is_noticed_without_a_call_and_gets_the_namespace_again(tmp_path):
    with RunningServer(tmp_path / "data") as server:
        link = connect(server)
        instance, namespace = link.server.instance, link.namespace(identity(), [LAYOUT], 5.0)
        server.kill()
        assert eventually(lambda: not link.probe())
    with RunningServer(tmp_path / "data") as server:
        assert eventually(link.probe)
        assert link.server.instance != instance
        assert link.namespace(identity(), [LAYOUT], 5.0) == namespace
        reply = link.call(lambda session: Match(session=session, namespace=namespace, tokens=bytes(256)), 5.0)
        assert reply.num_chunks == 0
        link.close()


def test_a_namespace_is_registered_once_a_session(server, monkeypatch):
    link = connect(server)
    calls = []
    call = link.call
    monkeypatch.setattr(link, "call", lambda *arguments: calls.append(1) or call(*arguments))
    for weights in ("a", "b", "a", "b"):
        assert link.namespace(identity(weights), [LAYOUT], 5.0)
    assert len(calls) == 2
    link.close()
