"""Registered documents as an engine sees them: over a link to a real server."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from cachetier.core.document_messages import SyncDocuments
from cachetier_connector import documents as documents_module
from cachetier_connector.documents import Documents
from cachetier_connector.plan import tokens_to_bytes
from tests.connector.servers import CHUNK, LAYOUT, TIMEOUT_S, Tier, connect, eventually, identity, stats_of, tokens_of
from tests.service.running import RunningServer

DOCUMENT = tokens_of(900, 4 * CHUNK + 10)


@dataclass
class Asking:
    """Documents over a link of their own, and what went through it."""

    tier: Tier
    documents: Documents = field(init=False)
    sent: list[Any] = field(default_factory=list)
    replies: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.link = connect(self.tier.server, "documents")
        call = self.link.call

        def remember(make_message, timeout_s):
            self.sent.append(make_message(7))
            self.replies.append(call(make_message, timeout_s))
            return self.replies[-1]

        self.link.call = remember
        self.documents = Documents(self.link, TIMEOUT_S, reads_pools=False)

    def register(self, name: str, tokens: list[int], salt: str = "") -> None:
        self.documents.register(self.tier.namespace, salt, name, tokens_to_bytes(tokens), CHUNK)

    def find(self, tokens: list[int], start: int = 0, salt: str = "", request_id: str = "r"):
        packed = tokens_to_bytes(tokens)
        return self.documents.find(self.tier.namespace, salt, packed, start, CHUNK, request_id)

    def kinds(self) -> list[str]:
        """Return what was sent since the last call."""
        kinds = [type(message).__name__ for message in self.sent]
        self.sent.clear()
        return kinds


@pytest.fixture
def asking(tier):
    asking = Asking(tier)
    yield asking
    asking.link.close()  # gives the leases back


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What the log says."""
    lines: list[str] = []
    monkeypatch.setattr(documents_module.log, "warning", lambda text, *values: lines.append(text % values))
    return lines


def test_a_registered_document_is_found_where_it_stands_and_leased(asking, tier):
    tier.store(DOCUMENT)
    asking.register("a", DOCUMENT)
    [run] = asking.find([*tokens_of(1, 37), *DOCUMENT, *tokens_of(2, 20)])
    assert (run.document, run.offset, run.num_tokens, run.match.num_chunks) == ("a", 37, 4 * CHUNK, 4)
    assert run.match.lease
    assert stats_of(tier.server)["leases"] == 1
    asking.link.close()
    assert eventually(lambda: stats_of(tier.server)["leases"] == 0)


def test_what_another_engine_registers_later_is_found_too(asking, tier):
    tier.store(DOCUMENT)
    assert asking.find([1, *DOCUMENT]) == []
    other = Asking(tier)
    other.register("a", DOCUMENT)
    other.link.close()
    assert [run.document for run in asking.find([1, *DOCUMENT])] == ["a"]


def test_the_list_travels_only_when_it_changed_and_prompts_only_when_a_document_may_stand_in_them(asking, tier):
    tier.store(DOCUMENT)
    prompt = [1, *DOCUMENT]
    asking.find(prompt)
    asking.register("a", DOCUMENT)
    asking.find(prompt)
    asking.replies.clear()
    assert asking.kinds() == ["SyncDocuments", "RegisterDocument", "SyncDocuments", "MatchDocuments"]
    asking.find(prompt)
    asking.find(tokens_of(3, 500))
    assert asking.kinds() == ["SyncDocuments", "MatchDocuments", "SyncDocuments"]
    assert [reply.fingerprints for reply in asking.replies if hasattr(reply, "fingerprints")] == [None, None]


def test_documents_inside_the_prefix_that_is_held_are_left_to_it(asking, tier, said):
    tier.store(DOCUMENT)
    asking.register("a", DOCUMENT)
    prompt = [*DOCUMENT, *tokens_of(4, 100)]
    assert asking.find(prompt, start=4 * CHUNK) == []
    assert [run.offset for run in asking.find(prompt, start=CHUNK)] == [0]
    assert said == [], "what is held exactly was not missed"


def test_tenants_find_only_their_own(asking, tier):
    tier.store(DOCUMENT)
    asking.register("a", DOCUMENT)
    assert asking.find([1, *DOCUMENT], salt="tenant") == []
    assert [run.document for run in asking.find([1, *DOCUMENT])] == ["a"]


def test_lists_of_so_many_tenants_are_kept_and_the_one_used_longest_ago_is_forgotten(asking, monkeypatch):
    monkeypatch.setattr(documents_module, "TENANTS_MAX", 2)
    for salt in ("one", "two"):
        asking.register("a", DOCUMENT, salt=salt)
    asking.sent.clear()
    for salt in ("one", "two", "one", "three", "one", "two"):
        asking.find(tokens_of(5, 300), salt=salt)
    versions = [message.version for message in asking.sent if isinstance(message, SyncDocuments)]
    assert [version != 0 for version in versions] == [False, False, True, False, True, False]
    assert len(asking.documents._known) == 2


def test_another_run_of_the_server_is_asked_for_everything_anew(tmp_path):
    """Its versions have nothing to do with those of the run before."""
    link = prompt = None
    for number, name in enumerate(("first", "second")):
        document = tokens_of(910 + number, 3 * CHUNK)
        with RunningServer(tmp_path / name) as server:
            tier = Tier(server)
            tier.store(document)
            if link is None:
                asking = Asking(tier)
                link = asking.link
            else:
                link.close()
                link._find_socket = lambda server=server: server.socket_path
                link.connect()
                link.namespace(identity(), [LAYOUT], TIMEOUT_S)
                asking.tier = tier
                asking.sent.clear()
                assert asking.find(prompt) == [], "what the server before knew is nothing to this one"
                assert asking.sent[0].version == 0
            asking.register("a", document)
            prompt = [1, *document]
            assert [run.document for run in asking.find(prompt)] == ["a"]
    link.close()


def test_a_server_that_is_gone_knows_no_documents(asking, tier, said):
    asking.register("a", DOCUMENT)
    asking.link.close()
    assert asking.find([1, *DOCUMENT]) == []
    assert said == []
    asking.register("b", DOCUMENT)
    assert "document 'b' could not be registered" in said[0]


@pytest.mark.parametrize(("num_tokens", "is_registered"), [(0, False), (CHUNK - 1, False), (127, False), (128, True)])
def test_what_is_too_short_is_not_registered(asking, said, num_tokens, is_registered):
    asking.register("a", tokens_of(6, num_tokens))
    assert (asking.kinds() == ["RegisterDocument"]) == is_registered
    assert (said == []) == is_registered
    assert is_registered or "shorter than 128 tokens" in said[0]


def test_a_prompt_without_any_of_the_documents_is_named_in_the_log_once_a_minute(asking, said, monkeypatch):
    asking.find(tokens_of(7, 300), request_id="nothing registered")
    assert said == []
    for number in range(3):
        asking.register(f"d{number}", tokens_of(920 + number, 200))
    for request_id in ("glued", "again"):
        asking.find([5, *tokens_of(920, 200)[1:]], request_id=request_id)
    assert said == ["cachetier: found 0 of 3 registered documents in request glued; `cachetier explain` tells why"]
    now_s = documents_module.time.monotonic()
    monkeypatch.setattr(documents_module.time, "monotonic", lambda: now_s + 61)
    asking.find([5, *tokens_of(920, 200)[1:]], request_id="a minute later")
    assert "request a minute later" in said[1]


def test_a_document_that_stands_there_but_is_not_held_any_more_is_missed_too(asking, tier, said):
    asking.register("a", DOCUMENT)
    assert asking.find([1, *DOCUMENT]) == []
    assert len(said) == 1
    assert "found 0 of 1" in said[0]


def test_a_prompt_in_which_a_document_is_found_is_not_complained_about(asking, tier, said):
    tier.store(DOCUMENT)
    asking.register("a", DOCUMENT)
    asking.register("b", tokens_of(930, 200))
    assert len(asking.find([1, *DOCUMENT])) == 1
    assert said == []
