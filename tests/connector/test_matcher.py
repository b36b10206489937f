"""The matcher: whatever becomes of a request or of the server, its lease is given back and nobody waits."""

import os
import signal
import time

import pytest
from msgspec.structs import replace

from cachetier.core.messages import TIER_HOST
from cachetier_connector import link as link_module
from cachetier_connector import matcher as matcher_module
from cachetier_connector.matcher import Matcher
from cachetier_connector.requests import MatchTicket, TrackedRequest
from cachetier_connector.wishes import Wishes
from tests.connector.engines import FakeRequest
from tests.connector.servers import CHUNK, LAYOUT, connect, eventually, identity, stats_of, tokens_of
from tests.service.running import RunningServer


@pytest.fixture
def matcher(tier, request):
    matcher = Matcher(connect(tier.server), identity(request.node.name), LAYOUT, max_blocking_s=2.0)
    yield matcher
    matcher.stop()


def tracked(tokens, *, may_load=True, may_blend=False, wishes=Wishes(), **attributes):  # noqa: B008 (it is a value)
    request = FakeRequest("r", tokens, **attributes)
    return TrackedRequest(request=request, wishes=wishes, may_load=may_load, may_store=True, may_blend=may_blend)


def done(ticket):
    eventually(ticket.done.is_set)
    return ticket


def leases(server):
    return stats_of(server)["leases"]


def test_a_ticket_says_what_is_held_and_holds_a_lease_until_it_is_released(tier, matcher):
    tokens = tokens_of(1, 3 * CHUNK + 5)
    tier.store(tokens)
    ticket = done(matcher.match(tracked(tokens)))
    assert (ticket.reply.num_chunks, ticket.chunk_tokens, ticket.namespace) == (3, CHUNK, tier.namespace)
    assert ticket.instance == tier.link.server.instance
    assert leases(tier.server) == 1
    before = stats_of(tier.server)["tokens"]["hit"]["host"]
    for _ in range(2):
        matcher.release(ticket, {TIER_HOST: 100})
        assert ticket.is_released  # so that it is not used again
    assert eventually(lambda: leases(tier.server) == 0)
    assert stats_of(tier.server)["tokens"]["hit"]["host"] == before + 100


def test_decoded_tokens_are_matched_too(tier, matcher):
    tokens = tokens_of(2, 2 * CHUNK)
    tier.store(tokens)
    asking = tracked(tokens[:100])
    for token in tokens[100:]:
        asking.request.decode(token)
    ticket = done(matcher.match(asking))
    assert ticket.reply.num_chunks == 2
    matcher.release(ticket)


def test_a_request_that_only_stores_takes_no_lease(tier, matcher):
    tokens = tokens_of(3, CHUNK)
    tier.store(tokens)
    ticket = done(matcher.match(tracked(tokens, may_load=False)))
    assert (ticket.reply.num_chunks, ticket.reply.lease) == (1, 0)


def test_a_ticket_abandoned_while_its_answer_is_on_the_way_gives_its_lease_back(tier, matcher, monkeypatch):
    tokens = tokens_of(4, CHUNK)
    tier.store(tokens)
    call = matcher._link.call

    def answer_late(make_message, timeout_s):
        reply = call(make_message, timeout_s)
        time.sleep(0.1)
        return reply

    monkeypatch.setattr(matcher._link, "call", answer_late)
    ticket = matcher.match(tracked(tokens))
    eventually(lambda: leases(tier.server) == 1)
    assert not ticket.done.is_set()
    matcher.release(ticket)
    assert done(ticket).reply.lease
    assert eventually(lambda: leases(tier.server) == 0)
    assert ticket.is_released


def test_salts_inputs_and_adapters_separate(tier, matcher, tmp_path):
    from vllm.lora.request import LoRARequest

    tokens = tokens_of(5, CHUNK)
    tier.store(tokens)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    one = LoRARequest("one", 1, str(tmp_path))
    other = LoRARequest("other", 2, str(tmp_path))
    assert done(matcher.match(tracked(tokens, may_load=False))).reply.num_chunks == 1
    tickets = [
        done(matcher.match(tracked(tokens, may_load=False, **attributes)))
        for attributes in ({"cache_salt": "salt"}, {"lora_request": one}, {"lora_request": other})
    ]
    assert [ticket.reply.num_chunks for ticket in tickets] == [0, 0, 0]
    assert len({tier.namespace, *(ticket.namespace for ticket in tickets[1:])}) == 3


def test_an_adapter_that_was_loaded_anew_with_other_weights_is_another_one(tier, matcher, tmp_path):
    from vllm.lora.request import LoRARequest

    tokens, spaces = tokens_of(6, CHUNK), set()
    for number in (1, 2):
        (tmp_path / "adapter_model.safetensors").write_bytes(b"weights %d" % number)
        request = tracked(tokens, may_load=False, lora_request=LoRARequest("one", number, str(tmp_path)))
        spaces.add(done(matcher.match(request)).namespace)
    assert len(spaces) == 2


def test_an_adapter_that_cannot_be_read_is_not_cached(tier, matcher):
    from vllm.lora.request import LoRARequest

    ticket = done(matcher.match(tracked(tokens_of(7, CHUNK), lora_request=LoRARequest("gone", 1, "/nowhere"))))
    assert ticket.reply is None


def test_a_new_generation_finds_nothing_of_the_one_before(tier, matcher):
    tokens = tokens_of(8, CHUNK)
    tier.store(tokens)
    matcher.start_generation(12345)
    ticket = done(matcher.match(tracked(tokens, may_load=False)))
    assert ticket.reply.num_chunks == 0
    assert ticket.namespace != tier.namespace


def test_a_dead_server_answers_at_once(tmp_path):
    with RunningServer(tmp_path / "data") as server:
        matcher = Matcher(connect(server), identity(), LAYOUT, max_blocking_s=0.2)
        server.kill()
        eventually(lambda: not matcher.is_up)
        ticket = matcher.match(tracked(tokens_of(9, CHUNK)))
        assert ticket.done.is_set()
        assert ticket.reply is None
        matcher.release(ticket)
        matcher.stop()


def test_a_stopped_server_holds_a_ticket_up_for_no_longer_than_the_deadline(tier, monkeypatch):
    monkeypatch.setattr(link_module, "PROBE_INTERVAL_S", 0.1)
    matcher = Matcher(connect(tier.server), identity(), LAYOUT, max_blocking_s=0.2)
    os.kill(tier.server.process.pid, signal.SIGSTOP)
    try:
        since = time.monotonic()
        ticket = matcher.match(tracked(tokens_of(10, CHUNK)))
        assert time.monotonic() - since < 0.05
        assert done(ticket).reply is None
        assert time.monotonic() - since < 1
    finally:
        os.kill(tier.server.process.pid, signal.SIGCONT)
    eventually(lambda: matcher.is_up)
    assert done(matcher.match(tracked(tokens_of(10, CHUNK)))).reply is not None
    matcher.stop()


@pytest.mark.parametrize(
    ("jobs_s", "lateness"),
    [([0.1] * 20, {0.9: False, 1.2: False, 1.7: True}), ([2.0], {0.6: False, 0.9: True})],
    ids=["others are answered", "nothing is answered"],
)
def test_a_ticket_is_late_when_nothing_is_answered_but_not_while_those_before_it_are(
    tier, monkeypatch, jobs_s, lateness
):
    monkeypatch.setattr(matcher_module, "TURN_DEADLINES", 8)
    matcher, found = Matcher(connect(tier.server), identity(), LAYOUT, max_blocking_s=0.2), {}
    for seconds in jobs_s:
        matcher._submit(lambda seconds=seconds: time.sleep(seconds))
    ticket = matcher.match(tracked(tokens_of(14, CHUNK)))
    for second in lateness:
        time.sleep(max(0, ticket.since_s + second - time.monotonic()))
        found[second] = matcher.is_late(ticket)
    assert found == lateness
    done(ticket)
    matcher.stop()


def test_a_lease_of_a_server_that_is_gone_is_not_given_back_to_the_next(tier, matcher):
    tokens = tokens_of(11, CHUNK)
    tier.store(tokens)
    ticket = done(matcher.match(tracked(tokens)))
    ticket.instance = "another server"
    before = stats_of(tier.server)["tokens"]["hit"]["host"]
    matcher.release(ticket, {TIER_HOST: 50})
    done(matcher.match(tracked(tokens, may_load=False)))
    assert stats_of(tier.server)["tokens"]["hit"]["host"] == before


def test_leases_are_renewed_and_one_that_expired_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(matcher_module, "IDLE_S", 0.02)
    from tests.connector.servers import Tier

    options = ("--host-bytes", "16MiB", "--disk-bytes", "64MiB", "--lease-ttl-s", "1")
    with RunningServer(tmp_path / "data", *options) as server:
        tier = Tier(server)
        tokens = tokens_of(12, CHUNK)
        tier.store(tokens)
        matcher = Matcher(connect(server), identity(), LAYOUT, max_blocking_s=2.0)
        ticket = done(matcher.match(tracked(tokens)))
        time.sleep(2.5)
        assert leases(server) == 1
        assert not ticket.is_released
        forgotten = replace(ticket.reply, lease=ticket.reply.lease + 1)
        other = done(matcher.match(tracked(tokens, may_load=False)))
        other.reply = forgotten
        matcher._leased[forgotten.lease] = other  # as after a pause longer than the lease
        assert eventually(lambda: other.is_released)
        matcher.stop()
        assert eventually(lambda: leases(server) == 0)


def test_the_queue_is_bounded_and_a_full_one_makes_a_miss(tier, monkeypatch):
    monkeypatch.setattr(matcher_module, "MAX_JOBS", 2)
    matcher = Matcher(connect(tier.server), identity(), LAYOUT, max_blocking_s=2.0)
    call = matcher._link.call
    monkeypatch.setattr(matcher._link, "call", lambda *arguments: time.sleep(0.2) or call(*arguments))
    tickets = [matcher.match(tracked(tokens_of(20 + number, CHUNK), may_load=False)) for number in range(6)]
    assert any(ticket.done.is_set() and ticket.reply is None for ticket in tickets)
    for ticket in tickets:
        done(ticket)
    assert any(ticket.reply is not None for ticket in tickets)
    matcher.stop()


class TestDocuments:
    """A prompt of 100 other tokens, a document of 4 chunks, and 30 tokens more."""

    DOCUMENT = tokens_of(30, 4 * CHUNK)
    PROMPT = (*tokens_of(31, 100), *DOCUMENT, *tokens_of(32, 30))

    @pytest.fixture
    def matcher(self, tier, matcher):
        """A matcher that has registered the document, as at the end of its request."""
        before = stats_of(tier.server)["documents"]
        tier.store(self.DOCUMENT)
        alone = tracked(self.DOCUMENT, may_load=False, wishes=Wishes(document="a"))
        matcher.register_document(alone, done(matcher.match(alone)))
        eventually(lambda: stats_of(tier.server)["documents"] == before + 1)
        return matcher

    def test_documents_are_found_for_those_who_may_blend_and_go_with_the_ticket_at_once(
        self, tier, matcher, monkeypatch
    ):
        ticket = done(matcher.match(tracked(self.PROMPT, may_blend=True)))
        [found] = ticket.documents
        assert (found.document, found.offset, found.ticket.reply.num_chunks) == ("a", 100, 4)
        assert (found.ticket.chunk_tokens, found.ticket.instance) == (CHUNK, ticket.instance)
        assert leases(tier.server) == 1
        hits = stats_of(tier.server)["tokens"]["hit"]["host"]
        release, released = matcher._release, []
        monkeypatch.setattr(matcher, "_release", lambda *args: released.append(args) or release(*args))
        for _ in range(2):
            matcher.release(ticket)
        assert eventually(lambda: leases(tier.server) == 0)
        assert len(released) == 1, "however many documents"
        assert stats_of(tier.server)["tokens"]["hit"]["host"] == hits
        assert done(matcher.match(tracked(self.PROMPT))).documents == []

    def test_a_document_that_is_part_of_the_held_prefix_is_not_looked_for(self, tier, matcher):
        ticket = done(matcher.match(tracked(self.DOCUMENT + tokens_of(33, 99), may_blend=True)))
        assert (ticket.reply.num_chunks, ticket.documents) == (4, [])
        matcher.release(ticket)

    def test_another_salt_finds_nothing(self, matcher):
        assert done(matcher.match(tracked(self.PROMPT, may_blend=True, cache_salt="another"))).documents == []

    @pytest.mark.parametrize("number", [0, 1, 2])
    def test_a_ticket_abandoned_at_any_moment_gives_the_documents_back(self, tier, matcher, monkeypatch, number):
        """Before one of the three calls that the answer takes."""
        call, calls, tickets = matcher._link.call, [], []

        def abandon(make_message, timeout_s):
            message = type(make_message(0)).__name__
            if len(calls) == number:
                matcher.release(*eventually(lambda: tickets))
            calls.append(message)
            return call(make_message, timeout_s)

        monkeypatch.setattr(matcher._link, "call", abandon)
        tickets.append(matcher.match(tracked(self.PROMPT, may_blend=True)))
        done(tickets[0])
        assert calls[: number + 1] == ["Match", "SyncDocuments", "MatchDocuments"][: number + 1]
        assert eventually(lambda: leases(tier.server) == 0)

    def test_the_leases_on_documents_are_renewed_too(self, tier, matcher):
        ticket = done(matcher.match(tracked(self.PROMPT, may_blend=True)))
        [found] = ticket.documents
        assert found.ticket.reply.lease in matcher._leased
        matcher.release(ticket)
        eventually(lambda: found.ticket.reply.lease not in matcher._leased)

    def test_a_request_that_was_never_matched_registers_nothing(self, matcher, monkeypatch):
        """Whose it would be is not known."""
        registered = []
        monkeypatch.setattr(matcher._documents, "register", lambda *args: registered.append(args))
        alone = tracked(self.DOCUMENT, may_load=False, wishes=Wishes(document="b"))
        matcher.register_document(alone, MatchTicket())
        done(matcher.match(alone))
        assert registered == []
