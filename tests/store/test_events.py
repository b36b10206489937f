"""What an engine is told of the tier's changes: it always adds up to what the tier holds, and to no secret of it."""

import random
from collections import deque

import pytest

from cachetier.core.errors import ProtocolError
from cachetier.core.event_messages import Change, FollowChanges
from cachetier.core.messages import TIER_DISK, TIER_HOST, Invalidate
from cachetier.store import events, held_chunks
from cachetier.store.chunk import ChunkState
from cachetier.store.events import CHUNKS_PER_REPLY, SILENT_MAX_S
from cachetier.store.store import Store
from tests.store.chunks import BIG
from tests.store.engines import MIB, Engine, keys_of, tokens_of


class Listener:
    """Follows the changes with an engine's session and keeps what they add up to: tiers by key.

    Like an engine it takes no new chunk whose parent it does not know.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tiers: dict[bytes, set[int]] = {}
        self.num_begun = 0

    def ask(self, most: int = 1 << 30) -> list[Change]:
        """Ask until there is no more, `most` times at most; return all that was said."""
        said = []
        for _ in range(most):
            message = FollowChanges(session=self.engine.sessions[0], namespace=self.engine.namespace)
            reply = self.engine.store.events.follow(message)
            if reply.starts_anew:
                self.tiers, self.num_begun = {}, self.num_begun + 1
            for change in reply.changes:
                self._take(change)
            said += reply.changes
            if not reply.has_more:
                break
        return said

    def _take(self, change: Change) -> None:
        assert len(change.tokens) in (0, len(tokens_of(1)))
        if change.tokens and (not change.parent or {change.parent, change.key} & self.tiers.keys()):
            self.tiers.setdefault(change.key, set()).add(change.tier)
        elif not change.tokens and change.key in self.tiers:
            self.tiers[change.key].discard(change.tier)
            if not self.tiers[change.key]:
                del self.tiers[change.key]


@pytest.fixture
def engine(store):
    return Engine(store)


@pytest.fixture
def listener(engine):
    return Listener(engine)


def truth(store: Store, keys: set[bytes]) -> dict[bytes, set[int]]:
    """Return the tiers of each of `keys` that is held."""
    chunks, disk, held = store._books.table.chunks, store._books.disk, {}
    for key in keys:
        tiers = {TIER_DISK} if disk.lookup(key) is not None else set()
        if key in chunks and chunks[key].state is ChunkState.READY:
            tiers.add(TIER_HOST)
        if tiers:
            held[key] = tiers
    return held


def test_who_begins_is_told_what_is_held_parents_first(open_store):
    engine = Engine(open_store())
    first, second = keys_of(engine.put(tokens_of(1, 2, 3))), keys_of(engine.put(tokens_of(1, 7)))
    engine.store.flush()
    engine = Engine(open_store())
    engine.load(tokens_of(1))
    third = keys_of(engine.put(tokens_of(9)))
    engine.store.flush()
    listener = Listener(engine)
    said = listener.ask()
    assert listener.tiers == {
        first[0]: {TIER_HOST, TIER_DISK}, first[1]: {TIER_DISK}, first[2]: {TIER_DISK}, second[1]: {TIER_DISK},
        third[0]: {TIER_HOST, TIER_DISK},
    }  # fmt: skip
    assert len(set(said)) == len(said), "nothing is said twice"
    by_key = {change.key: change for change in said}
    assert [by_key[key].parent for key in (*first, second[1], third[0])] == [b"", *first[:2], first[0], b""]
    assert [by_key[key].tokens for key in first] == [tokens_of(1), tokens_of(2), tokens_of(3)]
    order = list(dict.fromkeys(change.key for change in said))
    assert all(order.index(change.parent) < order.index(change.key) for change in said if change.parent)


def test_what_is_stored_flushed_and_dropped_is_told_as_it_happens(store, engine, listener):
    assert listener.ask() == []
    [key] = keys_of(engine.put(tokens_of(4)))
    store.flush()
    stored = [Change(key, TIER_HOST, tokens_of(4)), Change(key, TIER_DISK, tokens_of(4))]
    assert listener.ask() == stored
    assert listener.ask() == []
    store.invalidate(Invalidate(session=engine.sessions[0], keys=key))
    store.flush()
    store.flush()
    assert listener.ask() == [Change(key, TIER_HOST), Change(key, TIER_DISK)]
    assert listener.num_begun == 1


def test_nothing_is_said_of_salted_texts_images_and_other_models(store, engine, listener):
    other = Engine(store, name="other", model="another")
    listener.ask()
    engine.put(tokens_of(1, 2), salt="tenant")
    engine.put(tokens_of(3), extras=[(0, b"image")])
    other.put(tokens_of(5))
    store.flush()
    for following in (listener, Listener(Engine(store))):  # as changes, and when somebody begins
        assert [change for change in following.ask() if change.tokens] == []
        assert following.num_begun == 1


@pytest.mark.parametrize("seed", range(3))
def test_the_changes_add_up_to_what_is_held_through_evictions_on_both_tiers(open_store, seed):
    """Chunks of 256 KiB: 14 fit in memory, and segments of 1 MiB are reclaimed again and again."""
    store, rng = open_store(disk_bytes=16 * MIB), random.Random(seed)
    engine = Engine(store, layout=BIG)
    listener, keys, largest = Listener(engine), set[bytes](), 0
    for number in range(150):
        chain = [rng.randrange(8), *(rng.randrange(30) for _ in range(rng.randrange(3)))]
        if rng.random() < 0.7:
            keys |= set(keys_of(engine.put(tokens_of(*chain))))
        else:
            engine.load(tokens_of(*chain))
        if rng.random() < 0.1:
            store.flush()
        if number == 50 or rng.random() < 0.2:
            listener.ask()
            largest = max(largest, len(listener.tiers))
    store.flush()
    store.flush()
    listener.ask()
    assert listener.tiers == truth(store, keys)
    assert listener.num_begun == 1
    stats = store.stats()
    assert stats.host_evicted > 50
    assert stats.disk["evicted"] > 5
    assert largest > 14


@pytest.mark.parametrize("seed", range(3))
def test_what_is_stored_and_evicted_while_somebody_begins_is_told_as_well(open_store, monkeypatch, seed):
    monkeypatch.setattr(events, "CHUNKS_PER_REPLY", 3)
    monkeypatch.setattr(events, "LISTING_S", 0.0)
    monkeypatch.setattr(held_chunks, "CHUNKS_A_LOOK", 2)
    store, rng, keys = open_store(disk_bytes=64 * MIB), random.Random(seed), set[bytes]()
    engine, times_half_told = Engine(store, layout=BIG), 0
    listener, chains = Listener(engine), [[rng.randrange(6), rng.randrange(6), rng.randrange(3)] for _ in range(60)]
    for number, chain in enumerate(chains):
        keys |= set(keys_of(engine.put(tokens_of(*chain))))
        store.flush()
        if number > 20:
            listener.ask(3)
            times_half_told += 0 < len(listener.tiers) < len(keys)
    assert times_half_told > 3
    listener.ask()
    assert listener.tiers == truth(store, keys)
    assert listener.num_begun == 1
    assert store.stats().host_evicted > 50


def test_who_falls_behind_the_log_begins_anew(store, engine, listener):
    listener.ask()
    store._books.changes._entries = deque(maxlen=4)
    keys = keys_of(engine.put(tokens_of(*range(10))))
    store.flush()
    listener.ask()
    assert listener.num_begun == 2
    assert listener.tiers == {key: {TIER_HOST, TIER_DISK} for key in keys}


def test_the_log_is_kept_while_somebody_asks_and_no_longer(store, engine, listener, clock):
    changes = store._books.changes
    engine.put(tokens_of(1))
    assert changes.end == 0, "nobody follows"
    listener.ask()
    engine.put(tokens_of(2))
    assert len(changes._entries) > 0
    clock.now += SILENT_MAX_S + 1
    store.expire()
    assert (changes.is_followed, len(changes._entries)) == (False, 0)
    engine.put(tokens_of(3))
    listener.ask()
    assert listener.num_begun == 2
    assert len(listener.tiers) == 3
    store.close_session(engine.sessions[0])
    assert not changes.is_followed


def test_what_is_held_is_told_in_parts(open_store, monkeypatch):
    monkeypatch.setattr(events, "LISTING_S", 10.0)
    engine = Engine(open_store(host_bytes=16 * MIB))
    listener, count = Listener(engine), CHUNKS_PER_REPLY + 10
    for start in range(0, count, 100):
        engine.put(tokens_of(*range(start, min(start + 100, count))))
    listener.ask(1)
    assert len(listener.tiers) == CHUNKS_PER_REPLY
    listener.ask()
    assert (len(listener.tiers), listener.num_begun) == (count, 1)


def test_unknown_sessions_and_namespaces_are_404(store, engine):
    for session, namespace in ((1, engine.namespace), (engine.sessions[0], bytes(16))):
        with pytest.raises(ProtocolError) as refused:
            store.events.follow(FollowChanges(session=session, namespace=namespace))
        assert refused.value.status == 404
