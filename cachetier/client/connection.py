"""One keep-alive HTTP/1.1 connection over a Unix socket, with a hard deadline for every exchange.

It speaks just what cachetier's server answers (a status line, headers, a body of known length) because the match of
a request stands in the way of an engine's scheduler: `http.client` spends several times longer on a reply's headers
than this spends on all of it. Not thread-safe.
"""

import socket
import time
from typing import NamedTuple

from cachetier.core.errors import UnavailableError

MAX_HEADER_BYTES = 16 << 10
MAX_REPLY_BYTES = 64 << 20
RECEIVE_BYTES = 64 << 10  # more would be past the size from which malloc maps fresh memory: 0.2 ms a call


class Reply(NamedTuple):
    """An HTTP reply: its status and its body."""

    status: int
    body: bytes


class Connection:
    """A connection to the server at `socket_path`, made when first needed and made anew after a failure."""

    def __init__(self, socket_path: str) -> None:
        self.socket_path = socket_path
        self._socket: socket.socket | None = None

    def exchange(self, request: bytes, timeout_s: float, *, is_idempotent: bool) -> Reply:
        """Send `request` and return its reply.

        A kept connection that turns out broken is replaced and, if `is_idempotent`, the request sent once more.

        Raises:
            UnavailableError: no server, no answer within `timeout_s`, or an answer that is not HTTP.
        """
        deadline = time.monotonic() + timeout_s
        if self._socket is not None and has_hung_up(self._socket):
            self.close()
        was_kept = self._socket is not None
        try:
            return self._exchange_once(request, deadline)
        except ConnectionError as error:
            if not (was_kept and is_idempotent):
                raise self._unavailable(error) from error
        except OSError as error:
            raise self._unavailable(error) from error
        try:
            return self._exchange_once(request, deadline)
        except OSError as error:
            raise self._unavailable(error) from error

    def send(self, request: bytes, timeout_s: float) -> int:
        """Send `request` and return the status of its reply as soon as the headers are there; the body stays unread.

        Raises:
            UnavailableError: as `exchange`.
        """
        deadline = time.monotonic() + timeout_s
        try:
            self._start(request, deadline)
            return self._receive_headers(deadline)[0]
        except OSError as error:
            self.close()
            raise self._unavailable(error) from error

    def is_open(self) -> bool:
        """Tell whether the server has the other end still open; costs one system call and never waits."""
        return self._socket is not None and not has_hung_up(self._socket)

    def close(self) -> None:
        """Close the connection; the next exchange makes a new one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _unavailable(self, error: OSError) -> UnavailableError:
        reason = "it did not answer in time" if isinstance(error, TimeoutError) else error.strerror or str(error)
        return UnavailableError(f"cachetier server at unix:{self.socket_path}: {reason}")

    def _exchange_once(self, request: bytes, deadline: float) -> Reply:
        try:
            self._start(request, deadline)
            status, headers, body = self._receive_headers(deadline)
            length = _content_length(headers)
            parts, received = [body], len(body)
            while received < length:
                parts.append(self._receive(deadline))
                received += len(parts[-1])
            if received > length:
                raise OSError("the server sent more than one reply")
        except BaseException:
            self.close()  # whatever is still on its way would be taken for the next reply
            raise
        if b"connection: close" in headers:
            self.close()
        return Reply(status, b"".join(parts) if len(parts) > 1 else body)

    def _start(self, request: bytes, deadline: float) -> None:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(_remaining(deadline))
            self._socket.connect(self.socket_path)
        self._socket.settimeout(_remaining(deadline))
        self._socket.sendall(request)

    def _receive_headers(self, deadline: float) -> tuple[int, bytes, bytes]:
        """Return the status, the headers in lower case and what came of the body with them."""
        data = self._receive(deadline)
        while (end := data.find(b"\r\n\r\n")) < 0:
            if len(data) > MAX_HEADER_BYTES:
                raise OSError("the headers of its reply are too long")
            data += self._receive(deadline)
        status_line, _, headers = data[:end].partition(b"\r\n")
        words = status_line.split(b" ", 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise OSError("it does not speak HTTP")
        return int(words[1]), headers.lower(), data[end + 4 :]

    def _receive(self, deadline: float) -> bytes:
        assert self._socket is not None
        self._socket.settimeout(max(0.0, deadline - time.monotonic()))
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError as error:  # what came in time counts, however late this thread runs
            raise TimeoutError from error
        if not data:
            raise ConnectionResetError("it closed the connection")
        return data


def has_hung_up(connection: socket.socket) -> bool:
    """Tell whether an idle `connection` is of no more use: closed by the peer, or with bytes nobody asked for."""
    connection.setblocking(False)  # MSG_DONTWAIT would not do: Python itself waits out a socket's timeout
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def request_bytes(method: str, path: str, body: bytes = b"") -> bytes:
    """Return an HTTP/1.1 request; a body is msgpack."""
    head = f"{method} {path} HTTP/1.1\r\nHost: cachetier\r\n"
    if method == "POST":
        head += f"Content-Type: application/msgpack\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining


def _content_length(headers: bytes) -> int:
    for line in headers.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name == b"content-length" and value.strip().isdigit():
            length = int(value)
            if length > MAX_REPLY_BYTES:
                raise OSError(f"its reply of {length} bytes is too long")
            return length
    raise OSError("its reply has no length")
