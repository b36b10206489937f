"""The server's life on real sockets: who may connect, and what start, stop and crash leave behind."""

import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from cachetier.client.private_server import EXIT_IN_USE
from tests.service.running import (
    SMALL,
    TIMEOUT_S,
    RunningServer,
    TinyEngine,
    environment,
    rss_bytes,
    run_cli,
    serve_command,
    tokens_of,
)

TOKEN = "0123456789abcdef-token"


def refuse(data_dir: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run a server that must not start."""
    return run_cli("serve", "--data-dir", str(data_dir), *SMALL, *options)


def assert_one_line(outcome: "subprocess.CompletedProcess[str]", code: int, *words: str) -> None:
    assert outcome.returncode == code, outcome.stderr
    last = outcome.stderr.strip().splitlines()[-1]
    assert last.startswith("cachetier: error: ")
    assert "Traceback" not in outcome.stderr
    for word in words:
        assert word in last


def test_ready_line_names_socket_sizes_and_chunks(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "data") as server:
        path = tmp_path / "data" / "cachetier.sock"
        assert server.ready_line == f"cachetier ready: unix:{path}, host 16.0 MiB, disk 64.0 MiB, 0 chunks"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
        named = json.loads((tmp_path / "data" / "server.json").read_text())
        assert (named["pid"], named["socket"]) == (server.process.pid, str(path))
        assert server.stop() == 0
        assert not path.exists()
        assert not (tmp_path / "data" / "server.json").exists()


def test_signals_flush_and_a_restart_finds_the_chunks(tmp_path: Path) -> None:
    tokens = tokens_of(1, 40)
    with RunningServer(tmp_path / "data") as server:
        engine = TinyEngine(server.socket_path)
        assert engine.store(tokens) == 40
        arena_path = engine.session.server.arena_path
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - start < 10
        assert not os.path.exists(arena_path)
        engine.close()
    with RunningServer(tmp_path / "data") as server:
        assert server.ready_line.endswith(", 40 chunks")
        engine = TinyEngine(server.socket_path)
        reply = engine.match(tokens)
        assert reply.num_chunks == 40
        deadline = time.monotonic() + 5
        while any(engine.arena.state(offset) != 2 for offset in reply.frames):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert engine.holds_right_bytes(reply)
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 0
        engine.close()


def test_server_starts_after_sigkill_over_what_it_left(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "data") as server:
        server.kill()
        assert os.path.exists(server.socket_path)
    with RunningServer(tmp_path / "data") as server:
        TinyEngine(server.socket_path).close()


def test_second_server_on_a_data_directory_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "data") as server:
        outcome = refuse(tmp_path / "data", "--socket", str(tmp_path / "other.sock"))
        assert_one_line(outcome, EXIT_IN_USE, str(server.process.pid))
        engine = TinyEngine(server.socket_path)
        assert engine.store(tokens_of(1, 2)) == 2
        engine.close()


def test_socket_of_a_living_server_is_not_taken(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "data") as server:
        assert_one_line(refuse(tmp_path / "other", "--socket", server.socket_path), 2, server.socket_path, "--socket")
        TinyEngine(server.socket_path).close()


def test_file_in_the_place_of_the_socket_is_not_removed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    assert_one_line(refuse(tmp_path / "data", "--socket", str(precious)), 2, "no socket")
    assert precious.read_text() == "precious"


def test_data_directory_that_others_can_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o755)
    (tmp_path / "data").chmod(0o755)
    assert_one_line(refuse(tmp_path / "data"), 2, "chmod 700")


def test_tcp_without_token_file_is_refused(tmp_path: Path) -> None:
    assert_one_line(refuse(tmp_path / "data", "--tcp", "127.0.0.1:0"), 2, "token_file")


def test_tcp_needs_the_token_for_everything(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ("--tcp", f"127.0.0.1:{port}", "--token-file", str(tmp_path / "token"))
    with RunningServer(tmp_path / "data", *SMALL, *options) as server:
        wrong = ["", "Bearer", "Bearer ", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer \xff"]
        paths = ["/v1/stats", "/metrics", "/healthz", "/v1/match", "/nothing"]
        for path in paths:
            for header in wrong:
                assert status_of(port, path, header) == 401
        assert status_of(port, "/v1/stats", None) == 401
        assert status_of(port, "/v1/stats", f"Bearer {TOKEN}") == 200
        assert status_of(port, "/nothing", f"Bearer {TOKEN}") == 404
        engine, question = TinyEngine(server.socket_path), b'{"model": "tiny", "token_ids": [1, 2]}'
        assert status_of(port, "/v1/match", f"Bearer {TOKEN}", question) == 200, "a router on another node"
        assert status_of(port, "/v1/match", None, question) == 401
        engine.close()
        assert TOKEN not in server.log_path.read_text()


def status_of(port: int, path: str, authorization: str | None, question: bytes | None = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    headers = {} if authorization is None else {"Authorization": authorization}
    headers |= {"Content-Type": "application/json"} if question else {}
    connection.request("POST" if question else "GET", path, question, headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_port_in_use_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        outcome = refuse(tmp_path / "data", "--tcp", address, "--token-file", str(tmp_path / "token"))
    assert_one_line(outcome, 2, address)


def test_salts_are_neither_in_logs_nor_metrics_nor_statistics(tmp_path: Path) -> None:
    salt = "salt-of-a-tenant-4711"
    with RunningServer(tmp_path / "data", *SMALL, "--log-level", "debug") as server:
        engine = TinyEngine(server.socket_path, salt=salt)
        engine.store(tokens_of(1, 3))
        engine.release(engine.match(tokens_of(1, 3)))
        for method in (salt.encode(), b"GET / HTTP/1.1\r\n" + salt.encode() + b"\0"):
            assert b" 400 " in answer_to(server.socket_path, method + b" / HTTP/1.1\r\n\r\n")
        shown = engine.client.get("/metrics", TIMEOUT_S) + engine.client.get("/v1/stats", TIMEOUT_S)
        engine.close()
        assert server.stop() == 0
        assert salt.encode() not in shown + server.log_path.read_bytes()
    for path in (tmp_path / "data").rglob("*"):
        assert not path.is_file() or salt.encode() not in path.read_bytes()


def answer_to(socket_path: str, raw: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(socket_path)
        peer.sendall(raw)
        return peer.recv(100)


HANGING_DISK = """
import os, sys, time
from cachetier.cli import main
from cachetier.storage.file_layer import FileLayer

def hang(self, descriptor):
    if os.path.exists(sys.argv[1]):
        print("hanging", file=sys.stderr, flush=True)
        time.sleep(60)

FileLayer.fdatasync = hang
sys.exit(main.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_sigterm_ends_the_server_within_ten_seconds_even_when_the_disk_hangs(tmp_path: Path) -> None:
    hangs = tmp_path / "hangs"
    command = [sys.executable, "-c", HANGING_DISK, str(hangs), *serve_command(tmp_path / "data")[3:]]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as hanging:
        try:
            assert hanging.stdout is not None
            assert hanging.stderr is not None
            assert hanging.stdout.readline().startswith("cachetier ready")
            engine = TinyEngine(str(tmp_path / "data" / "cachetier.sock"))
            hangs.touch()
            engine.store(tokens_of(1, 5))
            while "hanging" not in hanging.stderr.readline():
                pass
            start = time.monotonic()
            hanging.terminate()
            assert hanging.wait(15) == 0
            assert time.monotonic() - start < 10
            assert "the disk hangs" in hanging.stderr.read()
            assert not os.path.exists(engine.session.server.arena_path)
            engine.close()
        finally:
            hanging.kill()


@pytest.mark.slow
def test_memory_of_the_server_stays_after_100_000_requests(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "data") as server:
        engine = TinyEngine(server.socket_path)
        warm, rounds = 2_000, 16_700
        for number in range(warm + rounds):
            if number == warm:
                before = rss_bytes(server.process.pid)
            tokens = tokens_of(number % 500, 2)
            engine.store(tokens)  # two requests, of which most find something to fill after eviction
            engine.release(engine.match(tokens))
            engine.client.get("/v1/stats", TIMEOUT_S)
            engine.match(tokens, lease=False)
        grown = rss_bytes(server.process.pid) - before
        assert grown < 8 << 20, f"grew by {grown} bytes"
        assert msgspec.json.decode(engine.client.get("/v1/stats", TIMEOUT_S))["leases"] == 0
        engine.close()
