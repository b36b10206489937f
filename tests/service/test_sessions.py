"""A session lives exactly as long as its watch connection."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from cachetier.client import Client
from cachetier.core.errors import ProtocolError
from cachetier.core.messages import Renew
from cachetier.store.leases import SESSION_LEASE_TIMES
from tests.service.running import SMALL, TIMEOUT_S, RunningServer, TinyEngine, environment, tokens_of

LEASE_HOLDER = """
import sys, time
from tests.service.running import TinyEngine, tokens_of
engine = TinyEngine(sys.argv[1])
held = engine.match(tokens_of(1, 4))
reserved = engine.client.call(engine.reserve(tokens_of(2, 4)), 10.0)
print(held.lease, reserved.lease, flush=True)
time.sleep(60)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with RunningServer(tmp_path / "data", *SMALL, "--lease-ttl-s", "1") as running:
        yield running


def stats_of(client: Client) -> dict[str, int]:
    stats: dict[str, int] = msgspec.json.decode(client.get("/v1/stats", TIMEOUT_S))
    return stats


def seconds_until(is_true: Callable[[], bool], limit_s: float) -> float:
    start = time.monotonic()
    while not is_true():
        assert time.monotonic() - start < limit_s
        time.sleep(0.01)
    return time.monotonic() - start


def test_killed_client_gives_its_leases_back_within_a_second(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "data", *SMALL, "--lease-ttl-s", "600") as server:
        engine = TinyEngine(server.socket_path)
        assert engine.store(tokens_of(1, 4)) == 4
        sessions = stats_of(engine.client)["sessions"]
        child = subprocess.Popen(
            [sys.executable, "-c", LEASE_HOLDER, server.socket_path],
            env=environment(), cwd=environment()["PYTHONPATH"], stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert child.stdout is not None
        leases = child.stdout.readline().split()
        assert all(int(lease) for lease in leases)
        held = stats_of(engine.client)
        assert (held["leases"], held["chunks_pending"], held["sessions"]) == (2, 4, sessions + 1)
        child.kill()
        child.wait()
        seconds_until(lambda: stats_of(engine.client)["leases"] == 0, 1.0)
        after = stats_of(engine.client)
        assert (after["chunks_pending"], after["sessions"]) == (0, sessions)
        assert engine.store(tokens_of(2, 4)) == 4, "what the dead client was storing is free for others"
        child.stdout.close()
        engine.close()


@pytest.mark.slow
def test_watched_session_may_be_silent(server: RunningServer) -> None:
    engine = TinyEngine(server.socket_path)
    time.sleep(SESSION_LEASE_TIMES + 2.0)
    assert engine.session.is_open()
    engine.client.call(Renew(session=engine.session.id, leases=[]), TIMEOUT_S)
    engine.close()


def test_closed_session_is_unknown_and_its_leases_are_gone(server: RunningServer) -> None:
    engine = TinyEngine(server.socket_path)
    engine.store(tokens_of(3, 2))
    assert engine.match(tokens_of(3, 2)).lease
    engine.session.close()
    assert not engine.session.is_open()
    seconds_until(lambda: stats_of(engine.client)["leases"] == 0, 1.0)
    with pytest.raises(ProtocolError) as error:
        engine.match(tokens_of(3, 2))
    assert error.value.status == 404
    engine.close()
