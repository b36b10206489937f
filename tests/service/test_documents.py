"""Documents through a real server: registered by one engine, found by another, also after the server was killed."""

import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from cachetier.core.document_messages import (
    DocumentRun,
    ListDocuments,
    MatchDocuments,
    RegisterDocument,
    RemoveDocument,
    SyncDocuments,
)
from cachetier.core.errors import ProtocolError
from cachetier.storage.documents import FILE_NAME
from tests.service.running import CHUNK_TOKENS, TIMEOUT_S, RunningServer, TinyEngine, tokens_of

TEXT, FINGERPRINT = tokens_of(7, 4), 2**64 - 7
PROMPT = tokens_of(8, 1)[:-12] + TEXT + tokens_of(9, 1)
OFFSET = CHUNK_TOKENS - 3


def register(engine: TinyEngine, name: str = "a") -> int:
    message = RegisterDocument(
        session=engine.session.id, namespace=engine.namespace, document=name, tokens=TEXT, fingerprint=FINGERPRINT
    )
    return engine.client.call(message, TIMEOUT_S).num_chunks


def find(engine: TinyEngine) -> list[DocumentRun]:
    message = MatchDocuments(
        session=engine.session.id,
        namespace=engine.namespace,
        tokens=PROMPT,
        candidates=[(0, FINGERPRINT), (OFFSET, FINGERPRINT)],
    )
    return engine.client.call(message, TIMEOUT_S).runs


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_engine_registers_another_finds_and_removal_ends_it(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "data") as server:
        first, second = TinyEngine(server.socket_path), TinyEngine(server.socket_path)
        first.store(TEXT)
        assert register(first) == 4
        reply = second.client.call(SyncDocuments(session=second.session.id, namespace=second.namespace), TIMEOUT_S)
        assert reply.fingerprints == FINGERPRINT.to_bytes(8, "little")
        (run,) = find(second)
        assert (run.offset, run.document, run.match.num_chunks) == (OFFSET, "a", 4)
        assert second.holds_right_bytes(run.match)
        second.release(run.match)
        listed = first.client.call(ListDocuments(), TIMEOUT_S)
        assert [(each.document, each.host_chunks) for each in listed.documents] == [("a", 4)]
        assert first.client.call(RemoveDocument(document="a"), TIMEOUT_S).removed == 1
        assert find(second) == []
        with pytest.raises(ProtocolError, match="printable"):
            register(first, "\n")
        first.close()
        second.close()


def test_what_was_registered_a_moment_ago_is_there_after_a_kill(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with RunningServer(data_dir) as server:
        engine = TinyEngine(server.socket_path)
        engine.store(TEXT)
        register(engine)
        wait_until((data_dir / FILE_NAME).exists)
        wait_until(lambda: msgspec.json.decode(engine.client.get("/v1/stats", TIMEOUT_S))["chunks_durable"] == 4)
        server.kill()
    with RunningServer(data_dir) as server:
        engine = TinyEngine(server.socket_path)
        (run,) = find(engine)
        assert (run.offset, run.match.num_chunks) == (OFFSET, 4)
        engine.release(run.match)
        engine.close()
