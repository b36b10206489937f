"""Mooncake Store: values in the memory of all nodes, one object a chunk; the server's side of the process that does it.

mooncake://MASTER_HOST:PORT?protocol=tcp&segment_bytes=1GiB&host=ADDRESS&devices=NAMES&metadata=P2PHANDSHAKE

Locking design: `_lock` guards who the process is, which calls wait for it, and the sending end of its socket. A thread
a process reads replies and hands them to the callers. A process that dies, or leaves a call unanswered for longer than
Mooncake's own time limits allow, is replaced by the next call; its segment, and what it held, is gone then. The process
is only started while the master can be connected to.
"""

import contextlib
import ctypes
import importlib.util
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from urllib.parse import SplitResult, parse_qsl

import msgspec

from cachetier.core.errors import ConfigError
from cachetier.core.units import parse_bytes
from cachetier.remote.base import FrameMemory, Head, Outcome, Place, RemoteStore, Value
from cachetier.remote.mooncake_messages import Reply, Request, Setup, receive, send

PARAMETERS = {"protocol": "tcp", "segment_bytes": "1GiB", "host": "", "devices": "", "metadata": "P2PHANDSHAKE"}
CONNECT_TIMEOUT_S = 0.5
SETUP_TIMEOUT_S = 15.0
CALL_TIMEOUT_S = 15.0
CLOSE_TIMEOUT_S = 3.0
# Mooncake's own limits: without them it waits for a stopped node for 30 seconds, and for a master for minutes.
LIMITS = {
    "MC_STORE_CLIENT_SETUP_RETRIES": "1",
    "MC_RPC_CONNECT_TIMEOUT_MS": "500",
    "MC_RPC_TIMEOUT_MS": "1000",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "2",
    "MC_TCP_STATUS_TIMEOUT_SEC": "2",
    "MC_LOG_LEVEL": "ERROR",
}
OUTCOMES = {0: Outcome.DONE, -704: Outcome.MISSING, -600: Outcome.MISSING, -200: Outcome.FULL}
LIBRARY = "libibverbs.so.1"  # what Mooncake needs and no Python package brings
PROCESS = "cachetier.remote.mooncake_process"

log = logging.getLogger(__name__)


def open_store(url: SplitResult, memory: FrameMemory) -> "MooncakeStore":
    """Return the store of a mooncake:// URL.

    Raises:
        ConfigError: a parameter is unknown or impossible, or Mooncake is not installed.
    """
    given = dict(parse_qsl(url.query))
    if unknown := given.keys() - PARAMETERS.keys():
        names = ", ".join(PARAMETERS)
        raise ConfigError(f"remote {url.geturl()}: unknown parameter {min(unknown)!r}; allowed are {names}")
    if importlib.util.find_spec("mooncake") is None:
        raise ConfigError(f"remote {url.geturl()}: Mooncake is not installed; run: pip install 'cachetier[mooncake]'")
    try:
        ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise ConfigError(f"remote {url.geturl()}: {error}; run: apt-get install libibverbs1") from error
    values = PARAMETERS | given
    try:
        master = url.hostname or "", url.port or 0
        segment_bytes = parse_bytes(values["segment_bytes"])
    except ValueError as error:
        raise ConfigError(f"remote {url.geturl()}: {error}") from error
    if not master[1]:
        raise ConfigError(f"remote {url.geturl()}: name the port of mooncake_master")
    if values["protocol"] not in ("tcp", "rdma"):
        raise ConfigError(f"remote {url.geturl()}: protocol is {values['protocol']!r}; choose from tcp, rdma")
    if values["host"] in ("0.0.0.0", "::", "localhost"):
        raise ConfigError(f"remote {url.geturl()}: host is {values['host']!r}; name an address that other nodes reach")
    setup = Setup(
        master=f"{master[0]}:{master[1]}",
        host=values["host"],
        protocol=values["protocol"],
        devices=values["devices"],
        metadata=values["metadata"],
        segment_bytes=segment_bytes,
        arena_path=memory.path,
        arena_bytes=memory.file_bytes,
        data_offset=memory.data_offset,
        descriptor=-1,
    )
    return MooncakeStore(setup, master)


class MooncakeStore(RemoteStore):
    """A client of a Mooncake Store that other nodes use too."""

    def __init__(self, setup: Setup, master: tuple[str, int]) -> None:
        self._setup = setup
        self._master = master
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        self._client: _Client | None = None
        self._is_closed = False

    def exists(self, keys: Sequence[str]) -> list[Outcome]:
        return self._outcomes(Request(0, "exists", list(keys)))

    def read_heads(self, keys: Sequence[str], num_bytes: int) -> list[Head]:
        reply = self._ask(Request(0, "read_heads", list(keys), header_bytes=[num_bytes]))
        if len(reply.codes) != len(keys):
            return [Head(Outcome.FAILED)] * len(keys)
        return [Head(_outcome(code), head) for code, head in zip(reply.codes, reply.heads, strict=True)]

    def put(self, values: Sequence[Value]) -> list[Outcome]:
        request = Request(
            0,
            "put",
            [value.key for value in values],
            headers=[value.header for value in values],
            frames=[list(value.frames) for value in values],
        )
        return self._outcomes(request)

    def get(self, places: Sequence[Place]) -> list[Outcome]:
        request = Request(
            0,
            "get",
            [place.key for place in places],
            header_bytes=[place.header_bytes for place in places],
            frames=[list(place.frames) for place in places],
        )
        return self._outcomes(request)

    def delete(self, keys: Sequence[str]) -> list[Outcome]:
        outcomes = self._outcomes(Request(0, "delete", list(keys)))
        return [Outcome.DONE if outcome is Outcome.MISSING else outcome for outcome in outcomes]

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _outcomes(self, request: Request) -> list[Outcome]:
        codes = self._ask(request).codes
        if len(codes) != len(request.keys):
            return [Outcome.FAILED] * len(request.keys)
        return [_outcome(code) for code in codes]

    def _ask(self, request: Request) -> Reply:
        """Return the reply; one without codes: there is nobody who could give one."""
        client = self._running()
        reply = client.ask(request) if client is not None else None
        return reply or Reply(0)

    def _running(self) -> "_Client | None":
        """Return the client's process, started if need be by one caller; None: there is none now."""
        client = self._client
        if client is not None and client.is_alive:
            return client
        if not self._starting.acquire(blocking=False):
            return None
        try:
            address = _address_towards(self._master)
            started = _Client(msgspec.structs.replace(self._setup, host=self._setup.host or address))
        except OSError as error:
            log.debug("no Mooncake client: %s", error)
            return None
        finally:
            self._starting.release()
        with self._lock:
            if not self._is_closed:
                self._client = started
                return started
        started.kill()
        return None


class _Client:
    """One run of the process, and the calls that wait for it."""

    def __init__(self, setup: Setup) -> None:
        """Start it and wait until it is set up.

        Raises:
            OSError: it could not be.
        """
        ours, theirs = socket.socketpair()
        argument = msgspec.json.encode(msgspec.structs.replace(setup, descriptor=theirs.fileno())).decode()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", PROCESS, argument],
                stdin=subprocess.DEVNULL,
                stdout=2,  # ours is for one line
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the server, which ends this process with itself
                env=os.environ | {name: os.environ.get(name, value) for name, value in LIMITS.items()},
            )
        self._connection = ours
        self._lock = threading.Lock()
        self._waiting: dict[int, _Call] = {}
        self._last_id = 0
        self.is_alive = True
        ours.settimeout(SETUP_TIMEOUT_S)
        is_set_up = receive(ours) is not None
        ours.settimeout(None)
        if not is_set_up:
            self.kill()
            raise OSError("the Mooncake client could not be set up; see the log above")
        threading.Thread(target=self._read, name="cachetier-mooncake", daemon=True).start()

    def ask(self, request: Request) -> Reply | None:
        """Send a batch and wait for its reply; None: the process is gone."""
        call = _Call()
        try:
            with self._lock:
                if not self.is_alive:
                    return None
                self._last_id += 1
                self._waiting[self._last_id] = call
                send(self._connection, msgspec.structs.replace(request, id=self._last_id))
        except OSError:
            self.kill()
        if not call.is_over.wait(CALL_TIMEOUT_S):
            log.warning("Mooncake did not end a call within %.0f s: starting it anew", CALL_TIMEOUT_S)
            self.kill()
            call.is_over.wait()
        return call.reply

    def close(self) -> None:
        """Have the process leave the store in order, and end it."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """End the process; when this returns it writes to no frame any more, and nobody waits for it."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._end()

    def _read(self) -> None:
        while (body := receive(self._connection)) is not None:
            reply = msgspec.msgpack.decode(body, type=Reply)
            with self._lock:
                call = self._waiting.pop(reply.id)
            call.reply = reply
            call.is_over.set()
        self.kill()  # or what is left of it
        self._connection.close()

    def _end(self) -> None:
        with self._lock:
            self.is_alive = False
            waiting, self._waiting = self._waiting, {}
        for call in waiting.values():
            call.is_over.set()


class _Call:
    """A caller that waits."""

    __slots__ = ("is_over", "reply")

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.reply: Reply | None = None


def _outcome(code: int) -> Outcome:
    return OUTCOMES.get(code, Outcome.FAILED)


def _address_towards(master: tuple[str, int]) -> str:
    """Connect to the master and return the address that this node has on the way there.

    Raises:
        OSError: the master cannot be reached.
    """
    with socket.create_connection(master, CONNECT_TIMEOUT_S) as connection:
        address: str = connection.getsockname()[0]
        return address
