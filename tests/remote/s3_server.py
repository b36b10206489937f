"""A real S3-compatible server for tests, in a process of its own, and the environment that points to it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import obstore
from obstore.store import S3Store

from tests.remote.masters import free_port

BUCKET = "kv-cache"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


class S3Server:
    """moto's server. It keeps what it has in memory."""

    def __init__(self, log: Path) -> None:
        """Start it and make the bucket."""
        self._log, self._port = log, free_port()
        self.environment = CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}"}
        self.url = f"s3://{BUCKET}/some/folder"
        self.start()

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)],
                stdout=output,
                stderr=output,
                env=os.environ | CREDENTIALS,
            )
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 0.2) as connection:
                request = f"PUT /{BUCKET} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                connection.sendall(request.encode())
                connection.settimeout(30)
                assert b"200" in connection.recv(4096)
                return
            assert time.monotonic() < deadline, self._log.read_text()[-2000:]
            time.sleep(0.05)

    def num_objects(self) -> int:
        """Return how many objects the bucket has."""
        options = {"allow_http": True}
        bucket = S3Store(BUCKET, endpoint=self.environment["AWS_ENDPOINT_URL"], region="us-east-1",
                         access_key_id="test", secret_access_key="test", client_options=options)  # fmt: skip
        return sum(len(page) for page in obstore.list(bucket))

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def running_s3(folder: Path) -> Iterator[S3Server]:
    """Run a server and set the environment variables by which stores find it."""
    server = S3Server(folder / "s3.log")
    before = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    try:
        yield server
    finally:
        server.kill()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
