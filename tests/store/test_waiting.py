"""Waits: a match gains chunks as they are stored, learns when no more will come, and leaves nothing behind."""

import pytest

from cachetier.core.engine_messages import AnnounceEngine
from cachetier.core.errors import ProtocolError
from cachetier.core.messages import RESERVE_DROPPED, TIER_DISK, TIER_HOST, Invalidate, MatchReply, Trim, Wait
from cachetier.core.wait_messages import AWAIT_MAX_S, AwaitChunks, EndPromise
from cachetier.store.pending import PROMISE_GRACE_S
from cachetier.store.promises import PROMISE_TTL_S
from tests.store.chunks import BIG, CHUNK_TOKENS
from tests.store.engines import Engine, tokens_of

PROMPT = tokens_of(1, 2, 3, 4)


@pytest.fixture
def producer(store):
    return Engine(store, "producer")


@pytest.fixture
def consumer(store):
    return Engine(store, "consumer", 2)


def waiting_match(engine: Engine, *, promised: bool = True, prefill: str = "", number: int = 1) -> MatchReply:
    return engine.match(PROMPT, wait=Wait(number=number, for_promised=promised, prefill=prefill))


def news_of(engine: Engine) -> list[tuple[int, int, int]]:
    """Return number, held and pending chunks of every wait of which there is news; held ones have their bytes."""
    reply = engine.store.waiting.news(AwaitChunks(session=engine.sessions[-1], within_s=0))
    assert all(all(engine.check(news.match)) for news in reply.news)
    return [(news.number, news.match.num_chunks, news.match.num_pending) for news in reply.news]


def announce(engine: Engine, role: str) -> None:
    engine.store.engines.announce(
        AnnounceEngine(
            session=engine.sessions[0], name=engine.name, role=role, namespace=engine.namespace, tensor_parallel=1,
            pipeline_parallel=1, block_tokens=16,
        )
    )  # fmt: skip


def end_promise(engine: Engine, promise: int, num_chunks: int, within_s: float = 2.0) -> None:
    engine.store.waiting.end_promise(
        EndPromise(session=engine.sessions[0], promise=promise, num_chunks=num_chunks, within_s=within_s)
    )


def test_a_match_gains_promised_chunks_as_they_are_stored(store, producer, consumer):
    producer.put(tokens_of(1))
    assert producer.match(PROMPT, lease=False, promise=True).promise
    reply = waiting_match(consumer)
    assert (reply.num_chunks, reply.num_pending, news_of(consumer)) == (1, 3, [])
    filled = producer.fill(tokens_of(1, 2))
    assert news_of(consumer) == []
    producer.commit(filled)
    assert news_of(consumer) == [(1, 2, 2)]
    assert news_of(consumer) == [], "the same news twice"
    producer.put(PROMPT)
    assert news_of(consumer) == [(1, 4, 0)]
    assert news_of(consumer) == []
    consumer.release(reply, host_tokens=4 * CHUNK_TOKENS, waited_tokens=3 * CHUNK_TOKENS)
    tokens = store.stats().tokens
    assert (tokens.hit.host, tokens.waited) == (4 * CHUNK_TOKENS, 3 * CHUNK_TOKENS)


def test_there_is_news_of_a_chunk_when_all_ranks_have_stored_it(store):
    producer, consumer = Engine(store, "producer", 2), Engine(store, "consumer")
    producer.match(PROMPT, lease=False, promise=True)
    waiting_match(consumer)
    first, second = producer.fill(tokens_of(1, 2), rank=0), producer.fill(tokens_of(1), rank=1)
    producer.commit(first)
    assert news_of(consumer) == []
    producer.commit(second)
    assert news_of(consumer) == [(1, 1, 3)]


def test_no_more_tokens_count_as_waited_for_than_were(store, producer, consumer):
    producer.put(tokens_of(1, 2, 3))
    producer.match(PROMPT, lease=False, promise=True)
    reply = waiting_match(consumer)
    producer.put(PROMPT)
    assert news_of(consumer) == [(1, 4, 0)]
    consumer.release(reply, host_tokens=1 << 40, waited_tokens=1 << 40)
    assert store.stats().tokens.waited == CHUNK_TOKENS
    assert store.stats().tokens.hit.host == 4 * CHUNK_TOKENS


def test_chunks_that_were_waited_for_are_not_evicted_before_the_lease_ends(store):
    producer, consumer = Engine(store, "producer", layout=BIG), Engine(store, "consumer", layout=BIG)
    producer.match(PROMPT, lease=False, promise=True)
    reply = waiting_match(consumer)
    producer.put(PROMPT)
    reply = store.waiting.news(AwaitChunks(session=consumer.sessions[0], within_s=0)).news[0].match
    for number in range(100, 120):
        producer.put(tokens_of(number))
    assert store.stats().host_evicted, "nothing had to go"
    assert all(consumer.check(reply))
    consumer.release(reply)
    assert store.stats().leases == 0


def test_a_producer_does_not_wait_for_itself(producer):
    producer.match(PROMPT, lease=False, promise=True)
    reply = waiting_match(producer)
    assert (reply.lease, reply.num_pending) == (0, 0)


def test_who_could_compute_waits_for_what_is_being_stored_and_not_for_promises(producer, consumer):
    producer.match(PROMPT, lease=False, promise=True)
    assert waiting_match(consumer, promised=False).lease == 0
    filled = producer.fill(tokens_of(1, 2))
    reply = waiting_match(consumer, promised=False)
    assert (reply.num_chunks, reply.num_pending) == (0, 2)
    producer.commit(filled)
    assert news_of(consumer) == [(1, 2, 0)]


def test_a_match_that_does_not_wait_is_told_what_is_coming_and_leases_nothing_for_it(store, producer, consumer):
    producer.match(PROMPT, lease=False, promise=True)
    reply = consumer.match(PROMPT)
    assert (reply.lease, reply.num_chunks, reply.num_pending) == (0, 0, 4)
    assert store.stats().leases == 0


@pytest.mark.parametrize("is_storing", [True, False])
def test_a_wait_is_in_vain_when_the_producer_dies(producer, consumer, is_storing):
    producer.match(PROMPT, lease=False, promise=True)
    waiting_match(consumer)
    producer.put(tokens_of(1, 2))
    if is_storing:
        producer.fill(tokens_of(1, 2, 3))
    assert news_of(consumer) == [(1, 2, 2)]
    producer.close()
    assert news_of(consumer) == [(1, 2, 0)]


def test_a_wait_is_in_vain_when_the_request_was_aborted_but_for_what_is_still_stored(store, clock, producer, consumer):
    promise = producer.match(PROMPT, lease=False, promise=True).promise
    waiting_match(consumer)
    filled = producer.fill(tokens_of(1))
    end_promise(producer, promise, num_chunks=2)
    assert news_of(consumer) == []
    producer.commit(filled)
    assert news_of(consumer) == [(1, 1, 1)]
    clock.now += 2.0
    store.expire()
    assert news_of(consumer) == [(1, 1, 0)]


def test_a_wait_is_in_vain_when_a_chunk_is_dropped(producer, consumer):
    producer.match(PROMPT, lease=False, promise=True)
    waiting_match(consumer)
    filled = producer.fill(tokens_of(1, 2))
    filled.checksums[1] = None
    producer.commit(filled)
    assert news_of(consumer) == [(1, 1, 0)]


def test_a_wait_is_in_vain_when_there_is_no_room(store):
    producer, consumer = Engine(store, "producer", layout=BIG), Engine(store, "consumer", layout=BIG)
    assert producer.fill(tokens_of(*range(100, 120))).reply.outcomes[-1] == RESERVE_DROPPED, "there is room for more"
    producer.match(PROMPT, lease=False, promise=True)
    waiting_match(consumer)
    assert not producer.reserve(PROMPT).lease
    assert news_of(consumer) == [(1, 0, 0)]


def test_a_promise_that_was_kept_is_none_any_more(store, producer, consumer):
    producer.match(PROMPT, lease=False, promise=True)
    keys = producer.put(PROMPT).keys
    store.invalidate(Invalidate(session=producer.sessions[0], keys=keys))
    assert waiting_match(consumer).num_pending == 0


def test_a_promise_lasts_no_longer_than_any(store, clock, producer, consumer):
    promise = producer.match(PROMPT, lease=False, promise=True).promise
    end_promise(producer, promise, num_chunks=4, within_s=1e9)
    assert waiting_match(consumer).num_pending == 4
    clock.now += PROMISE_TTL_S
    store._books.promises.expire(clock.now, lambda _: True)
    assert news_of(consumer) == [(1, 0, 0)]


@pytest.mark.parametrize(("role", "is_known", "expected"), [("producer", True, 4), ("both", True, 0), ("", False, 0)])
def test_the_engine_that_computes_the_prompt_is_given_time_to_promise_it(producer, consumer, role, is_known, expected):
    if is_known:
        announce(producer, role)
    reply = waiting_match(consumer, prefill="producer")
    assert (reply.num_pending, bool(reply.lease)) == (expected, bool(expected))


def test_the_promise_that_was_to_come_came_or_did_not(clock, producer, consumer):
    announce(producer, "producer")
    waiting_match(consumer, prefill="producer", number=1)
    clock.now += PROMISE_GRACE_S / 2
    assert news_of(consumer) == []
    waiting_match(consumer, prefill="producer", number=2)
    clock.now += PROMISE_GRACE_S / 2
    assert news_of(consumer) == [(1, 0, 0)]
    producer.match(PROMPT, lease=False, promise=True)
    clock.now += PROMISE_GRACE_S
    assert news_of(consumer) == []
    producer.put(PROMPT)
    assert news_of(consumer) == [(2, 4, 0)]


def test_what_stands_on_disk_behind_a_gap_is_read_once_the_gap_is_filled(open_store):
    store = open_store()
    Engine(store).put(PROMPT)
    store = open_store()  # all of it is on disk alone
    producer, consumer = Engine(store, "producer"), Engine(store, "consumer")
    first = producer.match(tokens_of(1), lease=False).keys
    store.invalidate(Invalidate(session=producer.sessions[0], keys=first))
    reply = producer.match(PROMPT, lease=False, promise=True)
    assert reply.num_chunks == 0
    assert waiting_match(consumer).num_pending == 4
    producer.put(PROMPT)
    [news] = store.waiting.news(AwaitChunks(session=consumer.sessions[0], within_s=0)).news
    assert news.match.tiers == bytes([TIER_HOST, TIER_DISK, TIER_DISK, TIER_DISK])
    assert all(consumer.check(news.match))


@pytest.mark.parametrize("how", ["release", "trim", "session", "expire"])
def test_a_wait_ends_with_its_lease_and_when_it_is_not_wanted(store, clock, producer, consumer, how):
    producer.put(tokens_of(1))
    producer.match(PROMPT, lease=False, promise=True)
    reply = waiting_match(consumer)
    producer.put(tokens_of(1, 2))
    assert news_of(consumer) == [(1, 2, 2)]
    other = Engine(store, "consumer")
    if how == "release":
        consumer.release(reply)
    elif how == "trim":
        store.trim(Trim(session=consumer.sessions[0], lease=reply.lease, num_chunks=1))
    elif how == "session":
        consumer.close()
    else:
        clock.now += store._config.lease_ttl_s
        store.expire()
    producer.put(PROMPT)
    assert news_of(other) == []
    assert store.stats().leases == (how == "trim")
    store.check_integrity()


def test_sessions_of_one_engine_share_its_waits_and_others_hear_nothing(store, producer, consumer):
    producer.match(PROMPT, lease=False, promise=True)
    waiting_match(consumer)
    producer.put(PROMPT)
    assert news_of(producer) == []
    assert news_of(Engine(store, "consumer")) == [(1, 4, 0)]


@pytest.mark.parametrize("within_s", [-1.0, AWAIT_MAX_S + 1, float("nan")])
def test_nobody_waits_for_an_impossible_time(consumer, within_s):
    with pytest.raises(ProtocolError, match="within_s"):
        consumer.store.waiting.news(AwaitChunks(session=consumer.sessions[0], within_s=within_s))
