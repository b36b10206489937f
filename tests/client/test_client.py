"""Calls keep their deadline against a stopped server and survive its restart."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachetier.client import Client
from cachetier.core.errors import ProtocolError, UnavailableError
from cachetier.core.messages import OpenSession, Renew
from tests.service.running import TIMEOUT_S, RunningServer, TinyEngine, tokens_of

OPEN = OpenSession(client="test", engine="e", pid=1)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with RunningServer(tmp_path / "data") as running:
        yield running


@pytest.mark.parametrize("is_connected", [True, False])
def test_stopped_server_is_unavailable_within_the_deadline(server: RunningServer, is_connected: bool) -> None:
    client = Client(server.socket_path)
    if is_connected:
        client.call(OPEN, TIMEOUT_S)
    server.process.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(UnavailableError, match="in time"):
        client.call(OPEN, 0.25)
    assert time.monotonic() - start < 0.4
    server.process.send_signal(signal.SIGCONT)
    assert client.call(OPEN, TIMEOUT_S).session
    client.close()


def test_large_request_to_a_stopped_server_keeps_the_deadline(server: RunningServer) -> None:
    engine = TinyEngine(server.socket_path)
    server.process.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    message = engine.reserve(bytes(20 << 20))  # does not fit into the socket's buffers
    with pytest.raises(UnavailableError, match="in time"):
        engine.client.call(message, 0.25)
    assert time.monotonic() - start < 0.5
    engine.close()


def test_restart_of_the_server_is_survived_and_old_sessions_are_unknown(server: RunningServer, tmp_path: Path) -> None:
    engine = TinyEngine(server.socket_path)
    old = engine.session
    server.kill()
    assert not old.is_open()
    with pytest.raises(UnavailableError):
        engine.client.call(OPEN, TIMEOUT_S)
    with RunningServer(tmp_path / "data"):
        with pytest.raises(ProtocolError) as error:
            engine.client.call(Renew(session=old.id, leases=[]), TIMEOUT_S)
        assert error.value.status == 404
        opened = engine.client.call(OPEN, TIMEOUT_S)
        assert opened.instance != old.server.instance
        assert opened.session != old.id, "a stale id must not name another's session"
    engine.close()


def test_refusal_carries_status_and_text(server: RunningServer) -> None:
    client = Client(server.socket_path)
    with pytest.raises(ProtocolError, match=r"/v1/") as error:
        client.get("/v7/stats", TIMEOUT_S)
    assert error.value.status == 404
    client.close()


def test_sixteen_engines_at_once_each_get_their_own_answers(server: RunningServer) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            engine = TinyEngine(server.socket_path, salt=f"tenant {number}")
            tokens = tokens_of(number, 5)
            assert engine.match(tokens).num_chunks == 0
            assert engine.store(tokens) == 5
            for _ in range(10):
                reply = engine.match(tokens)
                assert reply.num_chunks == 5
                assert engine.holds_right_bytes(reply)
                engine.release(reply)
            engine.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
