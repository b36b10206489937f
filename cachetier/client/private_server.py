"""A server for an engine that was told of none: join the one that holds the data directory, or start one.

The child runs in a process session of its own, so a Ctrl-C at the engine's terminal reaches the engine alone, which
then stops the child in order. When the engine is killed (SIGKILL included) the child sees that its parent process is
no longer `--parent-pid`, flushes and ends. Neither of the two usual means would do: PR_SET_PDEATHSIG fires when the
*thread* that started the child ends, and the end of a pipe is kept open by every process forked from the engine.

The child's standard error is read by a daemon thread of this process and goes to the log of this module.
"""

import collections
import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from cachetier.client.client import Client
from cachetier.core.config import ConnectorConfig, default_data_dir
from cachetier.core.errors import CachetierError, UnavailableError

EXIT_IN_USE = 3  # exit code of `cachetier serve` when another server holds the data directory
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 12.0
PROBE_TIMEOUT_S = 2.0
POLL_S = 0.02
ERROR_LINES = 15

log = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class ServerHandle:
    """A server to talk to. `process` is the child that this process started, or None when it joined another's.

    When the engine that owns the child stops, whoever joined it loses the server and should call `ensure_server`
    again: the first to do so starts the next one.
    """

    socket_path: str
    process: subprocess.Popen[str] | None = None

    def stop(self) -> None:
        """Stop the server if it is this process's child: it flushes what it holds. Blocks up to 12 s, then kills."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            log.warning("the private server did not stop within %.0f s and is killed", STOP_TIMEOUT_S)
            self.process.kill()
            self.process.wait()
        self.process = None


def ensure_server(config: ConnectorConfig, timeout_s: float = START_TIMEOUT_S) -> ServerHandle:
    """Return the server named in `config`, the one that holds its data directory, or a new child.

    Blocks until the server is ready. Several processes may call this at the same time for one directory: one
    starts the server, the others join it.

    Raises:
        UnavailableError: no server became ready in time; the text ends with what the child wrote to its standard error.
    """
    if config.server:
        return ServerHandle(config.server.removeprefix("unix:"))
    data_dir = config.data_dir or default_data_dir()
    deadline = time.monotonic() + timeout_s
    child: _Child | None = None
    while time.monotonic() < deadline:
        found = _find_server(data_dir)
        if found and child and found.pid == child.process.pid:
            return ServerHandle(found.socket_path, child.process)
        # While the child runs, server.json may still name a server that was killed and whose socket it has taken over.
        if found and (child is None or child.process.poll() is not None):
            return ServerHandle(found.socket_path)
        if child is None or child.process.poll() == EXIT_IN_USE:
            child = _Child(config, data_dir)
        elif child.process.poll() is not None:
            raise UnavailableError(f"the private server ended with {child.process.returncode}:\n{child.last_lines()}")
        time.sleep(POLL_S)
    if child is not None:
        child.process.kill()
        child.process.wait()
    raise UnavailableError(
        f"no private server became ready within {timeout_s:.0f} s:\n{child.last_lines() if child else ''}"
    )


def expected_socket(config: ConnectorConfig) -> str:
    """Return where the server of an engine with this configuration most likely listens; nothing is looked up."""
    return config.server.removeprefix("unix:") or str(Path(config.data_dir or default_data_dir(), "cachetier.sock"))


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    socket_path: str
    pid: int


def _find_server(data_dir: str) -> _Found | None:
    """Return the live server of `data_dir`, as its server.json names it."""
    try:
        named = json.loads(Path(data_dir, "server.json").read_text())
        found = _Found(str(named["socket"]), int(named["pid"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    client = Client(found.socket_path)
    try:
        client.get("/readyz", PROBE_TIMEOUT_S)
    except CachetierError:
        return None
    finally:
        client.close()
    return found


class _Child:
    """`cachetier serve` as a child, and the thread that reads its standard error."""

    def __init__(self, config: ConnectorConfig, data_dir: str) -> None:
        self.process = subprocess.Popen(
            _command(config, data_dir),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        assert self.process.stderr is not None
        self._lines: collections.deque[str] = collections.deque(maxlen=ERROR_LINES)
        self._reader = threading.Thread(
            target=self._read, args=(self.process.stderr,), name="cachetier-server-log", daemon=True
        )
        self._reader.start()

    def last_lines(self) -> str:
        self._reader.join(1.0)
        return "\n".join(self._lines)

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.append(line.rstrip())
            is_notable = " WARNING " in line or " ERROR " in line
            log.log(logging.WARNING if is_notable else logging.INFO, "server: %s", line.rstrip())


def _command(config: ConnectorConfig, data_dir: str) -> list[str]:
    return [
        *(sys.executable, "-m", "cachetier.cli.main", "serve"),
        *("--data-dir", data_dir),
        *("--host-bytes", str(config.host_bytes)),
        *("--disk-bytes", str(config.disk_bytes)),
        *("--chunk-tokens", str(config.chunk_tokens)),
        *("--parent-pid", str(os.getpid())),
    ]
