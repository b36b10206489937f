"""What the server and the process that holds its Mooncake client say to each other, over a socket pair.

Each message is msgpack with its length in front (4 bytes, little-endian). Frames are named by where they lie in the
arena, which both have mapped: payloads do not pass through here.
"""

import socket
import struct
from typing import Any

import msgspec

LENGTH = struct.Struct("<I")


class Setup(msgspec.Struct, frozen=True):
    """How the process is started: the one argument of its command line, in JSON.

    Attributes:
        master: HOST:PORT of mooncake_master.
        host: address under which other nodes reach this one.
        protocol: tcp or rdma.
        devices: names of the RDMA devices, separated by commas; empty: all.
        metadata: what Mooncake finds other nodes' memory by.
        segment_bytes: memory that this node gives to the store.
        arena_path: file that frames lie in.
        arena_bytes: its size.
        data_offset: where in it frame offsets count from.
        descriptor: of the socket.
    """

    master: str
    host: str
    protocol: str
    devices: str
    metadata: str
    segment_bytes: int
    arena_path: str
    arena_bytes: int
    data_offset: int
    descriptor: int


class Request(msgspec.Struct, frozen=True):
    """One batch.

    Attributes:
        id: names the reply.
        call: a method of `RemoteStore`.
        keys: what it is about.
        headers: put: the header of each value.
        header_bytes: read_heads and get: how long the header of each value is.
        frames: put and get: (offset, length) of each frame of each value.
    """

    id: int
    call: str
    keys: list[str]
    headers: list[bytes] = []
    header_bytes: list[int] = []
    frames: list[list[tuple[int, int]]] = []


class Reply(msgspec.Struct, frozen=True):
    """What became of a batch.

    Attributes:
        id: of the request; 0: the client is set up.
        codes: 0 for each key that worked, Mooncake's error for the others; none at all: the batch failed.
        heads: read_heads: the first bytes of each value.
    """

    id: int
    codes: list[int] = []
    heads: list[bytes] = []


def send(connection: socket.socket, message: Any) -> None:
    """Write one message; one thread at a time.

    Raises:
        OSError: the other side is gone.
    """
    body = msgspec.msgpack.encode(message)
    connection.sendall(LENGTH.pack(len(body)) + body)


def receive(connection: socket.socket) -> bytes | None:
    """Read one message, None: the other side is gone."""
    head = _read(connection, LENGTH.size)
    return _read(connection, LENGTH.unpack(head)[0]) if head else None


def _read(connection: socket.socket, size_bytes: int) -> bytes | None:
    data = bytearray()
    while len(data) < size_bytes:
        try:
            part = connection.recv(size_bytes - len(data))
        except OSError:
            return None
        if not part:
            return None
        data += part
    return bytes(data)
