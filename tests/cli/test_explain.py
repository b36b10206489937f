"""What `cachetier explain` says is what the server holds; and a document that almost stands in a prompt is named."""

import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachetier.cli.explain_report import OTHER_SALT, Findings, as_text
from cachetier.cli.explain_search import search
from cachetier.cli.main import main
from cachetier.core.document_messages import DocumentInfo, DocumentRun, RegisterDocument
from cachetier.core.messages import TIER_DISK, TIER_HOST, MatchReply
from tests.cli.openai_server import FakeEngine, running
from tests.service.running import CHUNK_TOKENS, TIMEOUT_S, RunningServer, TinyEngine

PRIVATE_USE = 0xE000  # characters that stand for themselves as tokens of the stand-in's tokenizer


def packed(tokens: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(tokens)}i", *tokens)


def text_of(seed: int, num_tokens: int) -> str:
    """Return a random text, one character a token."""
    rng = random.Random(seed)
    return "".join(chr(PRIVATE_USE + rng.randrange(6000)) for _ in range(num_tokens))


def tokens_of(text: str) -> list[int]:
    return list(map(ord, text))


def info(name: str, tokens: Sequence[int]) -> DocumentInfo:
    return DocumentInfo(
        document=name,
        model="tiny",
        num_tokens=len(tokens),
        num_chunks=len(tokens) // CHUNK_TOKENS,
        host_chunks=0,
        disk_chunks=0,
        registered_at_s=0.0,
        namespace=b"n",
        fingerprint=1,
        first_tokens=packed(tokens[:CHUNK_TOKENS]),
    )


def match(tiers: Sequence[int], num_pending: int = 0) -> MatchReply:
    return MatchReply(
        lease=0,
        num_chunks=len(tiers),
        keys=b"",
        tiers=bytes(tiers),
        tilings=[],
        tiling_of=b"",
        frames=[],
        checksums=[],
        num_pending=num_pending,
    )


class TestSearching:
    @given(st.integers(0, 300), st.integers(64, 200), st.lists(st.integers(0, 3), max_size=300))
    def test_a_document_is_found_wherever_it_stands(self, offset: int, length: int, filling: list[int]) -> None:
        document = tokens_of(text_of(1, length))
        before = (filling + [0] * offset)[:offset]
        places, near_misses = search(packed([*before, *document, 7]), [info("a", document)])
        assert [(place.offset, place.document.document) for place in places] == [(offset, "a")]
        assert near_misses == []

    def test_a_document_that_stands_there_twice_has_two_places(self) -> None:
        document = tokens_of(text_of(1, 100))
        places, _ = search(packed([1, *document, 2, 3, *document]), [info("a", document)])
        assert [place.offset for place in places] == [1, 103]

    @pytest.mark.parametrize("num_glued", [1, 2, 5])
    def test_glued_first_tokens_are_told_from_another_text(self, num_glued: int) -> None:
        document = tokens_of(text_of(1, 100))
        glued = [9, 9, *([5] * num_glued), *document[num_glued:]]
        places, (miss,) = search(packed(glued), [info("a", document)])
        assert places == []
        assert (miss.offset, miss.token, miss.num_different, miss.is_glued) == (2, 1, num_glued, True)

    @pytest.mark.parametrize("at", [3, 20, 40, 63])
    def test_another_token_further_on_is_located(self, at: int) -> None:
        document = tokens_of(text_of(1, 100))
        changed = [9, *document[:at], 5, *document[at + 1 :]]
        _, (miss,) = search(packed(changed), [info("a", document)])
        assert (miss.offset, miss.token, miss.num_different, miss.is_glued) == (1, at + 1, 1, False)

    def test_a_document_cut_off_by_the_ends_of_the_prompt_is_a_near_miss(self) -> None:
        document = tokens_of(text_of(1, 100))
        _, (before,) = search(packed([*document[10:], *document[:10]]), [info("a", document)])
        assert (before.offset, before.token, before.num_different) == (-10, 1, 10)
        _, (after,) = search(packed([1, *document[:40]]), [info("a", document)])
        assert (after.offset, after.token, after.num_different) == (1, 41, CHUNK_TOKENS - 40)

    def test_the_best_near_miss_counts_and_none_of_a_document_that_is_found(self) -> None:
        document = tokens_of(text_of(1, 100))
        worse, better = [*document[:30], *range(40)], [5, *document[1:]]
        _, (miss,) = search(packed([*worse, *better]), [info("a", document)])
        assert (miss.offset, miss.num_different) == (len(worse), 1)
        places, near_misses = search(packed([*better, *document]), [info("a", document)])
        assert [place.offset for place in places] == [len(better)]
        assert near_misses == []

    def test_other_texts_and_texts_shifted_by_bytes_are_nothing(self) -> None:
        document = tokens_of(text_of(1, 100))
        assert search(packed(tokens_of(text_of(2, 200))), [info("a", document)]) == ([], [])
        assert search(b"\0" + packed(document) + b"\0\0\0", [info("a", document)]) == ([], [])
        assert search(b"", [info("a", document)]) == ([], [])


class TestReporting:
    def test_every_token_is_loaded_or_computed_once(self) -> None:
        findings = Findings(
            num_tokens=1000,
            chunk_tokens=64,
            prefix=match([TIER_HOST, TIER_DISK]),
            runs=[
                DocumentRun(offset=200, document="a", num_tokens=256, match=match([TIER_HOST] * 4)),
                DocumentRun(offset=456, document="b", num_tokens=320, match=match([TIER_HOST] * 2 + [TIER_DISK] * 3)),
            ],
            registered=[info("a", [1] * 256), info("b", [1] * 320), info("c", [1] * 64)],
            places=[],
            near_misses=[],
        )
        lines = as_text(findings).splitlines()
        assert [" ".join(line.split()) for line in lines[:6]] == [
            "0 to 128 load exact prefix, from host memory (64) and disk (64)",
            "128 to 216 compute not held; and the first tokens of 'a', for what stands before them",
            "216 to 456 load document 'a', from host memory",
            "456 to 472 compute the first tokens of 'b', for what stands before them",
            "472 to 776 load document 'b', from host memory (112) and disk (192)",
            "776 to 1,000 compute after what is held",
        ]
        assert lines[6].startswith("would load 672 of 1,000 tokens (128 exactly, 544 approximately)")
        assert "found 2 of 3 registered documents" in lines

    def test_the_last_token_is_never_loaded(self) -> None:
        text = as_text(Findings(128, 64, match([TIER_HOST] * 2), [], [], [], []))
        assert "would load 127 of 128 tokens (127 exactly, 0 approximately)" in text
        assert "no documents are registered for this model" in text
        assert "blend" not in text

    def test_chunks_that_are_being_stored_are_mentioned(self) -> None:
        assert "2 chunks more are being stored" in as_text(Findings(500, 64, match([TIER_HOST], 2), [], [], [], []))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("explain") / "data") as running_server:
        yield running_server


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    fake = FakeEngine()
    fake.models = ["served"]
    fake.cards = {"served": {"root": "tiny"}}
    with running(fake) as server:
        yield server


class Documents:
    """Texts registered with the server by an engine of their own, whose namespace is then the latest."""

    def __init__(self, server: RunningServer, weights: str) -> None:
        self.engine = TinyEngine(server.socket_path, weights)

    def register(self, name: str, text: str, *, salt: str = "", num_stored: int | None = None) -> str:
        """Register `text`, and store its complete chunks, or those of its first `num_stored` tokens."""
        tokens = packed(tokens_of(text))
        self.engine.salt = salt
        num_chunks = (len(text) if num_stored is None else num_stored) // CHUNK_TOKENS
        self.engine.store(tokens[: num_chunks * CHUNK_TOKENS * 4])
        message = RegisterDocument(
            session=self.engine.session.id,
            namespace=self.engine.namespace,
            salt=salt,
            document=name,
            tokens=tokens,
            fingerprint=int.from_bytes(tokens[:8], "little"),
        )
        self.engine.client.call(message, TIMEOUT_S)
        return text

    def stats(self) -> tuple[object, int]:
        """Return the server's token counters and the number of leases."""
        stats = json.loads(self.engine.client.get("/v1/stats", TIMEOUT_S))
        return stats["tokens"], stats["leases"]


@pytest.fixture
def documents(server: RunningServer, request: pytest.FixtureRequest) -> Iterator[Documents]:
    documents = Documents(server, weights=request.node.name)
    yield documents
    documents.engine.close()


@pytest.fixture
def explain(
    engine: FakeEngine, server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    def explain_prompt(**prompt: object) -> str:
        (tmp_path / "prompt.jsonl").write_text(json.dumps(prompt))
        arguments = ["--url", engine.url, "--model", "served", "--socket", server.socket_path]
        assert main(["explain", *arguments, str(tmp_path / "prompt.jsonl")]) == 0
        return capsys.readouterr().out

    return explain_prompt


class TestAgainstAServer:
    def test_prefix_and_documents_are_found_in_any_order_and_nothing_is_leased_or_counted(
        self, documents: Documents, explain: Callable[..., str]
    ) -> None:
        prefix = text_of(10, 128)
        documents.engine.store(packed(tokens_of(prefix)))
        first, second, third = (documents.register(f"d{seed}", text_of(seed, 256)) for seed in (11, 12, 13))
        question = text_of(14, 50)
        before = documents.stats()
        text = explain(token_ids=tokens_of(prefix + third + "x" + first + question))
        assert "found 2 of 3 registered documents" in text
        assert "'d13' at token 128: 256 tokens\n" in text
        assert "'d11' at token 385: 256 tokens" in text
        assert "would load 608 of 691 tokens (128 exactly, 480 approximately)" in text
        assert second not in text
        assert documents.stats() == before

    def test_a_glued_document_is_a_near_miss(self, documents: Documents, explain: Callable[..., str]) -> None:
        document = documents.register("a.txt", text_of(20, 200))
        documents.register("b.txt", text_of(21, 200))
        text = explain(token_ids=tokens_of("xyz" + "!" + document[1:]))
        assert "found 0 of 2 registered documents" in text
        assert "'a.txt' differs at token 1 (it would begin at the prompt's token 3): the tokenizer glued its" in text
        assert "b.txt" not in text

    def test_a_document_of_which_nothing_or_too_little_is_held_is_to_be_warmed_again(
        self, documents: Documents, explain: Callable[..., str]
    ) -> None:
        gone = documents.register("gone", text_of(30, 200), num_stored=0)
        rest = documents.register("rest", text_of(31, 256), num_stored=64)
        text = explain(token_ids=tokens_of("ab" + gone + rest))
        assert "'gone' at token 2: registered, nothing held: warm it again" in text
        assert (
            "'rest' at token 202: 256 tokens; held only 64: warm it again; too little is held to be worth loading"
            in text
        )
        assert "would load 0 of 458 tokens" in text
        assert "blend" not in text

    def test_a_document_whose_held_part_is_not_worth_its_first_tokens_says_so(
        self, documents: Documents, explain: Callable[..., str]
    ) -> None:
        document = documents.register("a", text_of(35, 128))
        text = explain(token_ids=tokens_of("ab" + document + "c"))
        assert "'a' at token 2: 128 tokens; too little is held to be worth loading" in text
        assert "would load 0 of 131 tokens" in text

    def test_a_document_at_the_very_beginning_is_an_exact_prefix(
        self, documents: Documents, explain: Callable[..., str]
    ) -> None:
        document = documents.register("a", text_of(40, 256))
        text = explain(token_ids=tokens_of(document + "a question"))
        assert "found 1 of 1 registered documents" in text
        assert "'a' at token 0: at the very beginning: exact prefix" in text
        assert "would load 256 of 266 tokens (256 exactly, 0 approximately)" in text

    def test_a_document_that_stands_there_only_in_part_says_so(
        self, documents: Documents, explain: Callable[..., str]
    ) -> None:
        document = documents.register("a", text_of(50, 320))
        text = explain(token_ids=tokens_of("xx" + document[:200]))
        assert "'a' at token 2: the first 192 of its 320 tokens stand there" in text

    def test_another_tenants_document_is_not_used_and_the_salt_is_not_shown(
        self, documents: Documents, explain: Callable[..., str]
    ) -> None:
        document = documents.register("a", text_of(60, 256), salt="sesame")
        tokens = tokens_of("x" + document + "y")
        text = explain(token_ids=tokens)
        assert "found 0 of 1 registered documents" in text
        assert OTHER_SALT in text
        assert "sesame" not in text
        text = explain(token_ids=tokens, cache_salt="sesame")
        assert "found 1 of 1 registered documents" in text
        assert "would load 240 of 258 tokens (0 exactly, 240 approximately)" in text

    def test_texts_and_chats_are_explained_as_the_engine_would_see_them(
        self,
        engine: FakeEngine,
        server: RunningServer,
        documents: Documents,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        explain: Callable[..., str],
    ) -> None:
        document = documents.register("a", text_of(70, 256))
        text = explain(prompt=document)
        assert "'a' at token 1: 256 tokens" in text  # after the special token that the tokenizer puts before a text
        text = explain(messages=[{"role": "user", "content": document}])
        assert "'a' at token 1: 256 tokens" in text
        (tmp_path / "p.txt").write_text(document)
        arguments = ["--url", engine.url, "--socket", server.socket_path]
        assert main(["explain", *arguments, str(tmp_path / "p.txt")]) == 0
        assert "'a' at token 1" in capsys.readouterr().out


class TestRefusals:
    def test_a_model_that_the_server_does_not_know_is_named_beside_those_it_knows(
        self, engine: FakeEngine, server: RunningServer, documents: Documents, explain: Callable[..., str]
    ) -> None:
        engine.cards = {"served": {"root": "another"}}
        text = explain(token_ids=[1] * 100)
        assert "the server knows nothing of this model; it knows tiny" in text

    def test_an_adapter_is_not_the_model_under_it(
        self, engine: FakeEngine, server: RunningServer, documents: Documents, explain: Callable[..., str]
    ) -> None:
        engine.models = ["base", "served"]
        engine.cards = {"base": {"root": "tiny"}, "served": {"root": "/adapters/x", "parent": "base"}}
        text = explain(token_ids=[1] * 100)
        assert "the server knows nothing of this model" in text

    @pytest.mark.parametrize(
        ("line", "word"),
        [
            ("rubbish", "malformed"),
            ({"token_ids": [1 << 31]}, "out of range"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "images"),
        ],
    )
    def test_what_cannot_be_explained_is_named_and_the_rest_is_explained(
        self,
        engine: FakeEngine,
        server: RunningServer,
        documents: Documents,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        line: object,
        word: str,
    ) -> None:
        first = line if isinstance(line, str) else json.dumps(line)
        (tmp_path / "p").write_text(f'{first}\n{{"token_ids": [1, 2]}}\n')
        arguments = ["--url", engine.url, "--socket", server.socket_path, "--jsonl"]
        assert main(["explain", *arguments, str(tmp_path / "p")]) == 1
        output = capsys.readouterr()
        assert f"{tmp_path}/p:1: " in output.err
        assert word in output.err
        assert "p:2: 2 tokens" in output.out

    def test_no_server_is_exit_code_1_with_the_socket_named(
        self, engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "p.txt").write_text("x")
        arguments = ["--url", engine.url, "--socket", str(tmp_path / "none")]
        assert main(["explain", *arguments, str(tmp_path / "p.txt")]) == 1
        assert str(tmp_path / "none") in capsys.readouterr().err
