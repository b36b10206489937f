"""A real `mooncake_master` for tests, on ports of its own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def need_mooncake() -> None:
    """Skip the test where Mooncake cannot be had, and say what is missing."""
    try:
        import mooncake.store  # noqa: F401
    except ImportError as error:
        pytest.skip(f"Mooncake cannot be imported: {error} (apt-get install libibverbs1 libnuma1 libcurl4)")


class Master:
    """The process, which can be killed, stopped and started again at the same address."""

    def __init__(self, log: Path, address: str = "127.0.0.1", prefix: tuple[str, ...] = ()) -> None:
        """Start it; `prefix` is put before the command, to run it in a network namespace."""
        need_mooncake()
        self.address, self.port, self._metrics_port = address, free_port(), free_port()
        self._log, self._prefix = log, prefix
        self._process: subprocess.Popen | None = None
        self.start()

    @property
    def url(self) -> str:
        """The URL of its store, for a node with a small segment."""
        return f"mooncake://{self.address}:{self.port}?protocol=tcp&segment_bytes=64MiB"

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [
            *self._prefix,
            os.path.join(os.path.dirname(sys.executable), "mooncake_master"),
            f"-rpc_port={self.port}",
            f"-rpc_address={self.address}",
            f"-metrics_port={self._metrics_port}",
            f"-metrics_host={self.address}",
            "-client_ttl=3",
        ]
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        deadline = time.monotonic() + 20
        knock = f"import socket; socket.create_connection(('{self.address}', {self.port}), 1)"
        while subprocess.run([*self._prefix, sys.executable, "-c", knock], check=False, capture_output=True).returncode:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(self._log.read_text()[-2000:])

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def running_master(folder: Path) -> Iterator[Master]:
    """Run a master on the loopback."""
    master = Master(folder / "master.log")
    try:
        yield master
    finally:
        master.kill()
