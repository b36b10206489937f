"""The registered documents of a real server: listed as a table and as JSON, and forgotten."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachetier.cli.main import main
from cachetier.core.document_messages import LISTED_MAX, RegisterDocument
from tests.service.running import TIMEOUT_S, RunningServer, TinyEngine, tokens_of

FIRST, SECOND = tokens_of(1, 4), tokens_of(2, 3)


def register(engine: TinyEngine, name: str, tokens: bytes, fingerprint: int) -> None:
    message = RegisterDocument(
        session=engine.session.id,
        namespace=engine.namespace,
        salt=engine.salt,
        document=name,
        tokens=tokens,
        fingerprint=fingerprint,
    )
    engine.client.call(message, TIMEOUT_S)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with RunningServer(tmp_path / "data") as running:
        yield running


@pytest.fixture
def engine(server: RunningServer) -> Iterator[TinyEngine]:
    engine = TinyEngine(server.socket_path)
    engine.store(FIRST)
    register(engine, "first", FIRST, 1)
    register(engine, "a folder/second text", SECOND, 2)
    yield engine
    engine.close()


def documents(server: RunningServer, *arguments: str) -> int:
    return main(["documents", *arguments, "--socket", server.socket_path])


@pytest.mark.usefixtures("engine")
class TestListing:
    def test_the_table_tells_what_is_held_of_each(
        self, server: RunningServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert documents(server) == 0
        header, first, second = capsys.readouterr().out.splitlines()
        assert header.split() == ["DOCUMENT", "MODEL", "TOKENS", "CHUNKS", "IN", "HOST", "ON", "DISK", "REGISTERED"]
        assert first.split()[:5] == ["first", "tiny", "256", "4", "4"]
        assert second.startswith("a folder/second text  tiny")
        assert second.split()[4:8] == ["192", "3", "0", "0"]

    def test_json_has_the_public_names(self, server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
        assert documents(server, "--json") == 0
        first, second = json.loads(capsys.readouterr().out)
        assert first.pop("registered_at_s") <= second.pop("registered_at_s")
        assert 0 <= first.pop("disk_chunks") <= 4
        assert first == {"document": "first", "model": "tiny", "num_tokens": 256, "num_chunks": 4, "host_chunks": 4}
        assert second["host_chunks"] == second["disk_chunks"] == 0

    def test_a_removed_document_is_gone_and_removing_it_again_says_so(
        self, server: RunningServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert documents(server, "remove", "first") == 0
        assert "removed 1 of id 'first'" in capsys.readouterr().out
        assert documents(server, "--json") == 0
        assert [each["document"] for each in json.loads(capsys.readouterr().out)] == ["a folder/second text"]
        assert documents(server, "remove", "first") == 1
        assert "no document 'first'" in capsys.readouterr().out


def test_every_page_of_a_long_list_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunningServer(tmp_path / "data", "--host-bytes", "16MiB", "--disk-bytes", "256MiB") as server:
        engine = TinyEngine(server.socket_path)
        for number in range(LISTED_MAX + 100):
            register(engine, f"{number}", FIRST, 1)
        assert documents(server, "--json") == 0
        engine.close()
    names = [each["document"] for each in json.loads(capsys.readouterr().out)]
    assert names == list(map(str, range(LISTED_MAX + 100)))


def test_no_documents_and_no_server_are_told_apart(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert documents(server) == 0
    assert "no documents are registered" in capsys.readouterr().out
    assert main(["documents", "--socket", str(tmp_path / "none")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err
