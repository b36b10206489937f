"""Documents reach the engine alone, as token ids without special tokens, under their ids, and only once."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachetier.cli.main import main
from cachetier.cli.warm_check import as_text
from cachetier.cli.warm_documents import Document, DocumentReader
from cachetier.cli.warm_engine import Backoff, Engine, Sent
from cachetier.cli.warm_input import COMPLETIONS_PATH, Rejected, read_inputs
from cachetier.cli.warm_up import default_journal
from cachetier.core.document_messages import DOCUMENT_TOKENS_MIN, RegisterDocument
from tests.cli.openai_server import FakeEngine, running
from tests.service.running import TIMEOUT_S, RunningServer, TinyEngine

LONG = "a text of many words, " * 8


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with running(FakeEngine()) as server:
        yield server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with RunningServer(tmp_path / "data") as running_server:
        yield running_server


def warm_up(engine: FakeEngine, *arguments: object) -> int:
    return main(["warm", "--url", engine.url, "--concurrency", "1", *map(str, arguments)])


def sent_documents(engine: FakeEngine) -> dict[str, list[int]]:
    return {
        body["kv_transfer_params"]["cachetier"]["document"]: body["prompt"]
        for _, body in engine.requests
        if "kv_transfer_params" in body
    }


def lines_of(*lines: dict[str, Any]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


class TestSending:
    def test_a_text_is_sent_as_its_tokens_alone_under_the_path_as_it_was_given(
        self, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("a.txt").write_text(LONG)
        assert warm_up(engine, "--document", "./a.txt") == 0
        common = {"model": "tiny", "max_tokens": 1, "temperature": 0.0}
        wish = {"cachetier": {"document": "./a.txt"}}
        body = {"prompt": list(map(ord, LONG)), "kv_transfer_params": wish, **common}
        assert engine.requests == [("/v1/completions", body)]
        assert f"sent 1 documents, {len(LONG)} tokens" in capsys.readouterr().out

    def test_texts_in_a_folder_are_named_within_it(self, engine: FakeEngine, tmp_path: Path) -> None:
        for name in ("b.md", "sub/deep/c.txt"):
            (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "texts" / name).write_text(name + LONG)
        assert warm_up(engine, "--document", tmp_path / "texts") == 0
        assert list(sent_documents(engine)) == ["b.md", "sub/deep/c.txt"]

    @pytest.mark.parametrize(("name", "options"), [("d.jsonl", []), ("d", ["--jsonl"])])
    def test_lines_of_texts_and_tokens_are_sent_under_their_ids_and_salts(
        self, engine: FakeEngine, tmp_path: Path, name: str, options: list[str]
    ) -> None:
        tokens = list(range(200))
        lines = [{"id": "t", "text": LONG}, {"id": "n", "token_ids": tokens, "cache_salt": "s"}]
        (tmp_path / name).write_text(lines_of(*lines))
        assert warm_up(engine, "--document", *options, tmp_path / name) == 0
        assert sent_documents(engine) == {"t": list(map(ord, LONG)), "n": tokens}
        assert [body.get("cache_salt") for _, body in engine.requests] == [None, "s"]
        assert engine.num_tokenized == 1

    def test_short_documents_are_named_and_counted_and_fail_nothing(
        self, engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = [{"id": f"of {count}", "token_ids": [7] * count} for count in (127, 128)]
        (tmp_path / "d.jsonl").write_text(lines_of(*lines, {"id": "text", "text": "tiny"}, {"id": "none", "text": ""}))
        assert warm_up(engine, "--document", tmp_path / "d.jsonl") == 0
        output = capsys.readouterr()
        assert list(sent_documents(engine)) == ["of 128"]
        assert "skipped 2: too short to be a document" in output.out
        assert "skipped 1: empty" in output.out
        assert f"document 'of 127' has 127 tokens; it needs {DOCUMENT_TOKENS_MIN}" in output.err
        assert "document 'text' has 4 tokens" in output.err

    def test_plain_prompts_register_nothing(self, engine: FakeEngine, tmp_path: Path) -> None:
        (tmp_path / "p").write_text(lines_of({"prompt": LONG}))
        assert warm_up(engine, "--jsonl", tmp_path / "p") == 0
        assert sent_documents(engine) == {}
        assert engine.texts() == [LONG]

    def test_an_engine_that_cannot_tokenise_fails_the_document_and_says_why(
        self, engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        engine.tokenize_replies = [404]
        (tmp_path / "a.txt").write_text(LONG)
        (tmp_path / "b.txt").write_text(LONG)
        assert warm_up(engine, "--document", tmp_path / "a.txt", tmp_path / "b.txt") == 1
        assert list(sent_documents(engine)) == [str(tmp_path / "b.txt")]
        assert "a.txt: /tokenize: HTTP 404" in capsys.readouterr().err

    def test_a_busy_tokenizer_is_tried_again(self, engine: FakeEngine) -> None:
        async def send() -> object:
            async with Engine(engine.url, max_tokens=1, backoff=Backoff(3, 0.01, 0.02)) as client:
                await client.choose_model(None)
                return await client.send(Document("a", COMPLETIONS_PATH, {"prompt": LONG}, "a"))

        engine.tokenize_replies = [503, 429]
        assert asyncio.run(send()) == Sent(len(LONG))


class TestResuming:
    def test_a_document_and_a_prompt_of_one_text_are_two_things_to_a_journal(
        self, engine: FakeEngine, tmp_path: Path
    ) -> None:
        (tmp_path / "a.txt").write_text(LONG)
        arguments = ["--journal", tmp_path / "journal", tmp_path / "a.txt"]
        for _ in range(2):
            assert warm_up(engine, *arguments) == 0
            assert warm_up(engine, "--document", *arguments) == 0
        assert len(engine.requests) == 2

    def test_a_changed_text_is_sent_again(self, engine: FakeEngine, tmp_path: Path) -> None:
        for text in (LONG, LONG, LONG + "changed"):
            (tmp_path / "a.txt").write_text(text)
            assert warm_up(engine, "--document", "--journal", tmp_path / "journal", tmp_path / "a.txt") == 0
        assert [len(tokens) for tokens in engine.texts()] == [len(LONG), len(LONG) + 7]

    def test_a_run_of_documents_has_a_journal_of_its_own(self) -> None:
        assert default_journal("u", "m", ["x"]) != default_journal("u", "m", ["x"], are_documents=True)


class TestChecking:
    """With `--socket`, whether the server knows what was sent; the stand-in for an engine registers nothing itself."""

    @pytest.fixture
    def documents(self, tmp_path: Path) -> list[Path]:
        paths = [tmp_path / name for name in ("a.txt", "b.txt")]
        for path in paths:
            path.write_text(path.name + LONG)
        return paths

    def register(self, server: RunningServer, paths: list[Path], weights: str = "w") -> None:
        engine = TinyEngine(server.socket_path, weights)
        for path in paths:
            message = RegisterDocument(
                session=engine.session.id,
                namespace=engine.namespace,
                document=str(path),
                tokens=bytes(4 * 200),
                fingerprint=1,
            )
            engine.client.call(message, TIMEOUT_S)
        engine.close()

    def test_documents_that_are_registered_are_counted(
        self, engine: FakeEngine, server: RunningServer, documents: list[Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.register(server, documents)
        assert warm_up(engine, "--document", "--socket", server.socket_path, *documents) == 0
        assert "all 2 are registered" in capsys.readouterr().out

    def test_documents_that_are_not_are_named_and_the_command_has_failed(
        self, engine: FakeEngine, server: RunningServer, documents: list[Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.register(server, documents[:1])
        assert warm_up(engine, "--document", "--socket", server.socket_path, *documents) == 1
        out = capsys.readouterr().out
        assert f"1 of 2 are not registered: '{documents[1]}'; the engine has no cachetier connector" in out
        assert len(engine.requests) == 2
        assert warm_up(engine, "--document", "--socket", server.socket_path, *documents) == 1
        assert len(engine.requests) == 4, "they are sent again"

    def test_those_of_another_model_do_not_count(
        self, engine: FakeEngine, server: RunningServer, documents: list[Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        engine.cards = {"tiny": {"root": "another"}}
        self.register(server, documents)
        assert warm_up(engine, "--document", "--socket", server.socket_path, *documents) == 1
        assert "2 of 2 are not registered" in capsys.readouterr().out

    def test_an_engine_may_take_a_moment_to_register(
        self, engine: FakeEngine, server: RunningServer, documents: list[Path]
    ) -> None:
        later = threading.Timer(1.5, self.register, (server, documents))
        later.start()
        assert warm_up(engine, "--document", "--socket", server.socket_path, *documents) == 0
        later.join()

    def test_prompts_and_documents_that_were_not_sent_are_not_asked_about(
        self, engine: FakeEngine, server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "a.txt").write_text("short")
        assert warm_up(engine, "--document", "--socket", server.socket_path, tmp_path / "a.txt") == 0
        assert warm_up(engine, "--socket", server.socket_path, tmp_path / "a.txt") == 0
        assert "registered" not in capsys.readouterr().out

    def test_of_many_only_some_are_named(self) -> None:
        text = as_text(9, [f"d{number}" for number in range(7)])
        assert "7 of 9 are not registered: 'd0', 'd1', 'd2', 'd3', 'd4', ...;" in text


class TestReading:
    @pytest.mark.parametrize(
        ("line", "word"),
        [
            ('{"text": "a"}', "id"),
            ('{"id": "a"}', "exactly one"),
            ('{"id": "a", "text": "a", "token_ids": [1]}', "exactly one"),
            ('{"id": "a", "prompt": "a"}', "prompt"),
            ('{"id": 7, "text": "a"}', "str"),
            ('{"id": "", "text": "a"}', "printable"),
            ('{"id": "a\\nb", "text": "a"}', "printable"),
            (json.dumps({"id": "x" * 257, "text": "a"}), "256"),
            ("rubbish", "malformed"),
        ],
    )
    def test_a_line_that_is_no_document_is_rejected_with_the_reason(self, line: str, word: str) -> None:
        rejected = DocumentReader().of_line(line.encode(), "f:9")
        assert isinstance(rejected, Rejected)
        assert not rejected.is_empty
        assert word in rejected.reason

    @given(st.binary(max_size=200))
    def test_no_bytes_make_the_reader_fail(self, line: bytes) -> None:
        assert isinstance(DocumentReader().of_line(line, "f:1"), Document | Rejected)

    def test_one_id_for_two_texts_is_refused_but_not_across_salts_and_not_for_the_same_text(
        self, tmp_path: Path
    ) -> None:
        lines = [{"id": "a", "text": "x"}, {"id": "a", "text": "x"}, {"id": "a", "text": "y"}]
        (tmp_path / "d.jsonl").write_text(lines_of(*lines, {"id": "a", "text": "y", "cache_salt": "s"}))
        items = list(read_inputs([str(tmp_path / "d.jsonl")], DocumentReader().reading()))
        assert [type(item) for item in items] == [Document, Document, Rejected, Document]
        assert "already stands for another document" in items[2].reason  # type: ignore[union-attr]
