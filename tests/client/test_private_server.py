"""One private server a data directory, started by whoever comes first, gone with the engine that owns it."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cachetier.client import Client, ServerHandle, ensure_server
from cachetier.core.config import ConnectorConfig
from cachetier.core.errors import UnavailableError
from tests.service.running import SOURCE_ROOT, TIMEOUT_S, RunningServer, TinyEngine, environment, tokens_of

MIB = 1 << 20

OWNER = """
import sys, time
from cachetier.client import ensure_server
from cachetier.core.config import ConnectorConfig
handle = ensure_server(ConnectorConfig(data_dir=sys.argv[1], host_bytes=16 << 20, disk_bytes=64 << 20))
print(handle.process.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", SOURCE_ROOT)


def config_of(data_dir: Path) -> ConnectorConfig:
    return ConnectorConfig(data_dir=str(data_dir), host_bytes=16 * MIB, disk_bytes=64 * MIB)


def assert_serves(handle: ServerHandle) -> None:
    client = Client(handle.socket_path)
    client.get("/readyz", TIMEOUT_S)
    client.close()


def test_configured_server_is_not_started(tmp_path: Path) -> None:
    handle = ensure_server(ConnectorConfig(server=f"unix:{tmp_path}/sock"))
    assert handle == ServerHandle(f"{tmp_path}/sock", None)
    handle.stop()


def test_server_is_started_serves_and_keeps_chunks_over_stop(tmp_path: Path) -> None:
    for expected in (0, 3):
        handle = ensure_server(config_of(tmp_path / "data"))
        assert handle.process is not None
        process = handle.process
        engine = TinyEngine(handle.socket_path)
        assert engine.match(tokens_of(1, 3)).num_chunks == expected
        engine.store(tokens_of(1, 3))
        engine.close()
        handle.stop()
        assert process.returncode == 0
        handle.stop()


def test_running_server_is_joined_and_outlives_the_joiner(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "data") as server:
        handle = ensure_server(config_of(tmp_path / "data"))
        assert handle == ServerHandle(server.socket_path, None)
        handle.stop()
        assert_serves(handle)


def test_eight_at_once_share_one_server(tmp_path: Path) -> None:
    handles: list[ServerHandle] = []
    threads = [
        threading.Thread(target=lambda: handles.append(ensure_server(config_of(tmp_path / "data")))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(handles) == 8
    owners = [handle for handle in handles if handle.process]
    assert len(owners) == 1
    for handle in handles:
        assert_serves(handle)
    owners[0].stop()


def test_server_that_was_killed_is_replaced(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "data") as server:
        server.kill()
    handle = ensure_server(config_of(tmp_path / "data"))
    assert handle.process
    assert_serves(handle)
    handle.stop()


def test_server_that_cannot_start_gives_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o755)
    with pytest.raises(UnavailableError, match="chmod 700"):
        ensure_server(config_of(tmp_path / "data"))


def test_directory_whose_holder_never_gets_ready_times_out(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "data"):
        os.unlink(tmp_path / "data" / "server.json")
        start = time.monotonic()
        with pytest.raises(UnavailableError, match="ready within 2 s"):
            ensure_server(config_of(tmp_path / "data"), timeout_s=2.0)
        assert time.monotonic() - start < 4.0


def test_child_ends_when_its_engine_is_killed(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "data")], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert json.loads((tmp_path / "data" / "server.json").read_text())["pid"] == pid
    owner.kill()
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "data" / "server.json").exists(), "it ended in order"
