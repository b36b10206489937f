"""The connection keeps its deadline and never takes one reply for another, whatever the peer does."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachetier.client.connection import MAX_HEADER_BYTES, Connection, Reply, request_bytes
from cachetier.core.errors import UnavailableError

GET = request_bytes("GET", "/")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Peer = Callable[[socket.socket], None]
Listen = Callable[[list[Peer]], Connection]


@pytest.fixture
def listen(tmp_path: Path) -> Iterator[Listen]:
    """Give a function that makes a connection to peers: the first serves the first connection, and so on."""
    threads: list[threading.Thread] = []
    connections: list[Connection] = []

    def start(peers: list[Peer]) -> Connection:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "peer"))
        listener.listen()

        def serve() -> None:
            for peer in peers:
                accepted, _ = listener.accept()
                with accepted, contextlib.suppress(OSError):
                    peer(accepted)
            listener.close()

        threads.append(threading.Thread(target=serve, daemon=True))
        threads[-1].start()
        connections.append(Connection(str(tmp_path / "peer")))
        return connections[-1]

    yield start
    for connection in connections:
        connection.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def answer(*pieces: bytes, pause_s: float = 0.0) -> Peer:
    """Read a request, send `pieces` one by one, hang up."""

    def peer(accepted: socket.socket) -> None:
        accepted.recv(1 << 16)
        for piece in pieces:
            accepted.sendall(piece)
            time.sleep(pause_s)

    return peer


def keep_answering(accepted: socket.socket) -> None:
    while accepted.recv(1 << 16):
        accepted.sendall(OK)


def hang(accepted: socket.socket) -> None:
    while accepted.recv(1 << 16):
        pass


def test_no_socket_is_unavailable_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="nobody"):
        Connection(str(tmp_path / "nobody")).exchange(GET, 1.0, is_idempotent=True)


def test_reply_in_single_bytes_is_put_together(listen: Listen) -> None:
    connection = listen([answer(*(OK[i : i + 1] for i in range(len(OK))), pause_s=0.001)])
    assert connection.exchange(GET, 5.0, is_idempotent=False) == Reply(200, b"ok")


def test_large_reply_is_put_together(listen: Listen) -> None:
    body = bytes(range(256)) * 20_000
    connection = listen([answer(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body), body)])
    assert connection.exchange(GET, 5.0, is_idempotent=False).body == body


@pytest.mark.parametrize(
    "pieces",
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n",),
        (b"HTTP/1.1 abc\r\n\r\n",),
        (b"HTTP/1.1 200 OK\r\n\r\n",),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nok",),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok",),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * (MAX_HEADER_BYTES + 1),),
        (b"",),
    ],
)
def test_what_is_no_reply_is_unavailable(listen: Listen, pieces: tuple[bytes, ...]) -> None:
    connection = listen([answer(*pieces)])
    with pytest.raises(UnavailableError):
        connection.exchange(GET, 5.0, is_idempotent=True)
    assert not connection.is_open()


@pytest.mark.parametrize("peer", [hang, answer(b"HTTP/1.1 2", b"00", b" OK", *[b"x"] * 60, pause_s=0.02)])
def test_deadline_holds_for_silent_and_for_slow_peers(listen: Listen, peer: Peer) -> None:
    connection = listen([peer])
    start = time.monotonic()
    with pytest.raises(UnavailableError, match="in time"):
        connection.exchange(GET, 0.3, is_idempotent=True)
    assert 0.3 <= time.monotonic() - start < 0.5


def test_what_has_come_by_the_deadline_counts_for_a_thread_that_reads_it_late(
    listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, start = listen([keep_answering]), Connection._start

    def start_and_sleep(self: Connection, request: bytes, deadline: float) -> None:
        start(self, request, deadline)
        time.sleep(deadline + 0.1 - time.monotonic())

    monkeypatch.setattr(Connection, "_start", start_and_sleep)
    assert connection.exchange(GET, 0.3, is_idempotent=True) == Reply(200, b"ok")


def test_connection_is_kept(listen: Listen) -> None:
    connection = listen([keep_answering])
    for _ in range(3):
        assert connection.exchange(GET, 5.0, is_idempotent=False).body == b"ok"


@pytest.mark.parametrize("is_idempotent", [True, False])
def test_connection_closed_while_idle_is_replaced_unseen(listen: Listen, is_idempotent: bool) -> None:
    connection = listen([answer(OK), answer(OK)])
    assert connection.exchange(GET, 5.0, is_idempotent=False).body == b"ok"
    time.sleep(0.05)
    assert not connection.is_open()
    assert connection.exchange(GET, 5.0, is_idempotent=is_idempotent).body == b"ok"


def answer_then_drop(accepted: socket.socket) -> None:
    """Answer once, and hang up on the second request after it came."""
    accepted.recv(1 << 16)
    accepted.sendall(OK)
    accepted.recv(1 << 16)


def test_connection_broken_during_a_request_is_retried_once_if_idempotent(listen: Listen) -> None:
    connection = listen([answer_then_drop, answer_then_drop, answer(OK)])
    assert connection.exchange(GET, 5.0, is_idempotent=True).body == b"ok"
    assert connection.exchange(GET, 5.0, is_idempotent=True).body == b"ok"
    with pytest.raises(UnavailableError):
        connection.exchange(GET, 5.0, is_idempotent=False)
    assert connection.exchange(GET, 5.0, is_idempotent=True).body == b"ok"


def test_leftover_bytes_are_not_taken_for_the_next_reply(listen: Listen) -> None:
    connection = listen([answer(OK, b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nold", pause_s=0.1), answer(OK)])
    assert connection.exchange(GET, 5.0, is_idempotent=True).body == b"ok"
    time.sleep(0.15)
    assert connection.exchange(GET, 5.0, is_idempotent=True).body == b"ok"
