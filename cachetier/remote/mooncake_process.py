"""The process that holds a server's Mooncake client.

Run as `python -m cachetier.remote.mooncake_process SETUP`. It is a process of its own because Mooncake's `setup` keeps
Python's lock for seconds when the master does not answer, which would stop the whole server; because a fault in the
library must not take the tier along; and because Mooncake listens on all addresses and asks nobody who he is, so
that its process had better hold nothing but what is shared anyway.

The main thread reads requests; each runs on a thread of a pool, whose calls release the lock. The process ends when the
server does: then its end of the socket closes. The arena is registered once, and bytes go from and to it directly.
"""

import ctypes
import mmap
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import msgspec
from mooncake.store import MooncakeDistributedStore, ReplicateConfig

from cachetier.remote.mooncake_messages import Reply, Request, Setup, receive, send

THREADS = 16
STAGING_BYTES = 1 << 20  # of each thread, for headers
LOCAL_BUFFER_BYTES = 16 << 20
CLOSE_TIMEOUT_S = 3
INVALID_PARAMETERS, NOT_FOUND = -600, -704


class MappedMemory:
    """Memory that Mooncake may read and write."""

    def __init__(self, client: MooncakeDistributedStore, mapped: mmap.mmap) -> None:
        self.bytes = memoryview(mapped)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        code = client.register_buffer(self.address, len(mapped))
        if code:
            raise OSError(f"memory could not be registered: {code}")


class Batches:
    """The calls of `RemoteStore`, on Mooncake."""

    def __init__(self, client: MooncakeDistributedStore, setup: Setup) -> None:
        self._client = client
        self._data_offset = setup.data_offset
        with open(setup.arena_path, "r+b") as file:
            self._arena = MappedMemory(client, mmap.mmap(file.fileno(), setup.arena_bytes))
        self._local = threading.local()
        self._placing = ReplicateConfig()
        if setup.segment_bytes:  # this node's own memory first: a dead node's is on the master's list for a while
            self._placing.preferred_segment = client.get_hostname()

    def exists(self, request: Request) -> Reply:
        """1 means that a value is there, 0 that it is not; a negative number is an error, and true as well."""
        found = self._client.batch_is_exist(request.keys)
        return Reply(request.id, [{1: 0, 0: NOT_FOUND}.get(code, code) for code in found])

    def read_heads(self, request: Request) -> Reply:
        staging, size = self._staging(), request.header_bytes[0]
        codes, heads = [], []
        for start in range(0, len(request.keys), STAGING_BYTES // size):
            keys = request.keys[start : start + STAGING_BYTES // size]
            ranges = [[(number * size, 0, size)] for number in range(len(keys))]
            codes += self._get(staging, keys, ranges)
            heads += [bytes(staging.bytes[number * size : number * size + size]) for number in range(len(keys))]
        return Reply(request.id, codes, [b"" if code else head for code, head in zip(codes, heads, strict=True)])

    def get(self, request: Request) -> Reply:
        ranges = []
        for header_bytes, frames in zip(request.header_bytes, request.frames, strict=True):
            starts = accumulate((length for _, length in frames), initial=header_bytes)
            ranges.append(
                [(self._data_offset + to, start, length) for (to, length), start in zip(frames, starts, strict=False)]
            )
        return Reply(request.id, self._get(self._arena, request.keys, ranges))

    def put(self, request: Request) -> Reply:
        staging, at = self._staging(), 0
        addresses, sizes = [], []
        for header, frames in zip(request.headers, request.frames, strict=True):
            staging.bytes[at : at + len(header)] = header
            base = self._arena.address + self._data_offset
            addresses.append([staging.address + at, *(base + offset for offset, _ in frames)])
            sizes.append([len(header), *(length for _, length in frames)])
            at += len(header)
        return Reply(
            request.id, self._client.batch_put_from_multi_buffers(request.keys, addresses, sizes, self._placing)
        )

    def delete(self, request: Request) -> Reply:
        return Reply(request.id, self._client.batch_remove(request.keys, True))

    def _get(self, memory: MappedMemory, keys: list[str], ranges: list[list[tuple[int, int, int]]]) -> list[int]:
        """Read (to, from, length) ranges of each value into `memory`; return 0 or the error of each."""
        to, source, lengths = ([[each[part] for each in row] for row in ranges] for part in range(3))
        [found] = self._client.get_into_ranges([memory.address], [keys], [to], [source], [lengths])
        return [
            0 if got == wanted else min([code for code in got if code < 0], default=INVALID_PARAMETERS)
            for got, wanted in zip(found, lengths, strict=True)
        ]

    def _staging(self) -> MappedMemory:
        if not hasattr(self._local, "staging"):
            self._local.staging = MappedMemory(self._client, mmap.mmap(-1, STAGING_BYTES))
        staging: MappedMemory = self._local.staging
        return staging


def main() -> None:
    """Set the client up and serve batches until the server is gone."""
    setup = msgspec.json.decode(sys.argv[1], type=Setup)
    connection = socket.socket(fileno=setup.descriptor)
    client = MooncakeDistributedStore()
    code = client.setup(
        setup.host, setup.metadata, setup.segment_bytes, LOCAL_BUFFER_BYTES, setup.protocol, setup.devices, setup.master
    )
    if code:
        sys.stderr.write(f"the Mooncake client could not be set up: {code}\n")
        os._exit(1)
    batches = Batches(client, setup)
    sending = threading.Lock()

    def serve(call: Callable[[Request], Reply], request: Request) -> None:
        try:
            reply = call(request)
        except Exception as error:  # the thread's boundary: the server takes a missing code for a failure
            sys.stderr.write(f"{request.call} failed: {error!r}\n")
            reply = Reply(request.id)
        with sending:
            send(connection, reply)

    send(connection, Reply(0))
    pool = ThreadPoolExecutor(THREADS)
    while (body := receive(connection)) is not None:
        request = msgspec.msgpack.decode(body, type=Request)
        pool.submit(serve, getattr(batches, request.call), request)
    signal.alarm(CLOSE_TIMEOUT_S)  # its default action ends the process, also while the library keeps Python's lock
    client.close()  # or the master would send others to this node's memory until it misses its heartbeat
    os._exit(0)  # calls may be waiting for nodes that are gone


if __name__ == "__main__":
    main()
