"""Real servers with a real S3 store: what one has stored another one serves, and a store that hangs stops nobody."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cachetier.core.arena_format import STATE_FILLING
from cachetier.core.messages import TIER_REMOTE
from tests.remote.s3_server import running_s3
from tests.service.running import SMALL, RunningServer, TinyEngine, tokens_of

PROMPT = tokens_of(1, 4)


@pytest.fixture
def s3(tmp_path):
    with running_s3(tmp_path) as server:
        yield server


@pytest.fixture
def nodes(tmp_path, s3):
    """Two servers that share a store."""
    (tmp_path / "secret").write_text("ab" * 32)
    options = (*SMALL, "--remote", s3.url, "--secret-file", str(tmp_path / "secret"), "--remote-deadline-ms", "300")
    with RunningServer(tmp_path / "a", *options) as one, RunningServer(tmp_path / "b", *options) as other:
        engines = [TinyEngine(each.socket_path) for each in (one, other)]
        for engine in engines:
            eventually(lambda: stats(engine)["remote_available"])  # noqa: B023
        yield engines
        s3.send(signal.SIGCONT)
        for engine in engines:
            engine.close()


def stats(engine):
    return json.loads(engine.client.get("/v1/stats", 5))


def eventually(is_true):
    deadline = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def share(nodes, s3):
    producer, consumer = nodes
    producer.store(PROMPT)
    eventually(lambda: s3.num_objects() == 4)
    return producer, consumer


def test_what_one_server_has_stored_another_one_serves(nodes, s3):
    _, consumer = share(nodes, s3)
    reply = consumer.match(PROMPT)
    assert reply.tiers == bytes([TIER_REMOTE] * 4)
    eventually(lambda: all(consumer.arena.state(offset) != STATE_FILLING for offset in reply.frames))
    assert consumer.holds_right_bytes(reply)
    consumer.release(reply)


def test_a_store_that_hangs_keeps_its_match_for_the_deadline_and_nobody_else_at_all(nodes, s3):
    _, consumer = share(nodes, s3)
    bystander = TinyEngine(consumer.socket_path)
    s3.send(signal.SIGSTOP)
    start, waits = time.monotonic(), []
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(consumer.match, PROMPT)
        while not waiting.done():
            asked = time.monotonic()
            stats(bystander)
            waits.append(time.monotonic() - asked)
        assert waiting.result().num_chunks == 0
    assert 0.3 <= time.monotonic() - start < 1.5
    assert len(waits) > 10
    assert max(waits) < 0.2
    bystander.close()
    start = time.monotonic()
    assert consumer.match(PROMPT).num_chunks == 0
    assert time.monotonic() - start < 0.2
    s3.send(signal.SIGCONT)
    eventually(lambda: stats(consumer)["remote_available"])
    assert consumer.match(PROMPT).num_chunks == 4
