"""The store against a model: whatever happens in whatever order, what comes back is what was stored.

The arena holds 14 chunks and the disk about 40, of the 150 that the prompts have, so most of what is stored has to go.
The model is a dictionary of what was committed. A hit must be in it, byte for byte; a leased chunk must stay as it is
until its lease ends; what was durable must be there after a restart unless the disk tier says that it evicted.
"""

import shutil
import tempfile
from collections import defaultdict

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from cachetier.core.errors import ProtocolError
from cachetier.core.layout import KVLayout, Shard
from cachetier.core.messages import Invalidate, MatchReply, Renew, Wait
from cachetier.core.wait_messages import AwaitChunks, EndPromise
from cachetier.store.store import Store
from tests.store.engines import MIB, Engine, Filled, keys_of, make_config, tokens_of

LAYOUT = KVLayout(num_layers=4, num_kv_heads=2, row_bytes=2048)  # 256 KiB a chunk
TTL_S = 10.0
PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)
RANKS = {"one": 1, "two": 2}
ENGINES = st.sampled_from(sorted(RANKS))
SALTS = st.sampled_from(["", "tenant"])


def prompt_of(path: tuple[int, ...]) -> bytes:
    return tokens_of(*(step + 10 * depth for depth, step in enumerate(path)))


class StoreMachine(RuleBasedStateMachine):
    """Engines with one and two ranks, two tenants, one store that is restarted now and then."""

    filled = Bundle("filled")
    held = Bundle("held")
    host_only = False
    quota = 1.0

    @initialize()
    def open(self) -> None:
        self.folder = tempfile.mkdtemp()
        self.now = 0.0
        self.committed: dict[bytes, set[Shard]] = defaultdict(set)
        self.start()

    def start(self) -> None:
        config = make_config(
            self.folder, host_bytes=4 * MIB, disk_bytes=0 if self.host_only else 16 * MIB,
            segment_bytes=0 if self.host_only else MIB, lease_ttl_s=TTL_S, tenant_quota=self.quota,
        )  # fmt: skip
        self.store = Store(config, clock=lambda: self.now)
        self.engines: dict[str, Engine] = {}
        self.alive: dict[int, float] = {}  # lease -> when it expires
        self.waits: list[MatchReply] = []  # the latest reply to each match that waits
        self.promises: dict[str, list[int]] = defaultdict(list)
        for name in RANKS:
            self.connect(name)

    def connect(self, name: str) -> None:
        self.engines[name] = Engine(self.store, name, RANKS[name], layout=LAYOUT)

    @rule(name=ENGINES, path=PATHS, salt=SALTS)
    def put(self, name: str, path: tuple[int, ...], salt: str) -> None:
        engine = self.engines[name]
        filled = [engine.fill(prompt_of(path), rank, salt=salt) for rank in range(engine.num_ranks)]
        for rank, one in enumerate(filled):
            if one.reply.lease:
                self.alive[one.reply.lease] = self.now + TTL_S
            self.commit(engine, rank, one, one.checksums)

    def commit(self, engine: Engine, rank: int, filled: Filled, checksums: list[int | None]) -> None:
        to_fill = [
            key for key, outcome in zip(keys_of(filled.reply), filled.reply.outcomes, strict=True) if outcome == 0
        ]
        is_alive = self.alive.pop(filled.reply.lease, None) is not None
        accepted = engine.commit(Filled(filled.session, filled.reply, checksums))
        assert is_alive or not accepted, "a lease that had expired was accepted"
        assert accepted <= sum(checksum is not None for checksum in checksums)
        for key, checksum in zip(to_fill, checksums, strict=True):
            if checksum is not None and accepted:
                self.committed[key].add(engine.tiling[rank])

    @rule(target=filled, name=ENGINES, rank=st.integers(0, 1), path=PATHS)
    def start_to_fill(self, name: str, rank: int, path: tuple[int, ...]) -> object:
        engine = self.engines[name]
        rank %= engine.num_ranks
        one = engine.fill(prompt_of(path), rank)
        if not one.reply.lease:
            return multiple()
        self.alive[one.reply.lease] = self.now + TTL_S
        return engine, rank, one

    @rule(one=consumes(filled), drop=st.integers(0, 31))
    def finish_filling(self, one: tuple[Engine, int, Filled], drop: int) -> None:
        engine, rank, filled = one
        if engine.store is not self.store:
            return
        checksums = [None if drop >> n & 1 and drop < 16 else c for n, c in enumerate(filled.checksums)]
        if engine is self.engines[engine.name]:
            self.commit(engine, rank, filled, checksums)
            return
        with pytest.raises(ProtocolError) as caught:
            self.commit(engine, rank, filled, checksums)
        assert caught.value.status == 404

    @rule(target=held, name=ENGINES, path=PATHS, salt=SALTS)
    def match(self, name: str, path: tuple[int, ...], salt: str) -> object:
        engine = self.engines[name]
        reply = engine.match(prompt_of(path), salt=salt)
        self.check(engine, reply)
        if not reply.lease:
            assert reply.num_chunks == 0
            return multiple()
        self.alive[reply.lease] = self.now + TTL_S
        return engine, reply

    @rule(target=held, name=ENGINES, path=PATHS, for_promised=st.booleans())
    def match_and_wait(self, name: str, path: tuple[int, ...], for_promised: bool) -> object:
        engine, number = self.engines[name], len(self.waits) + 1
        reply = engine.match(prompt_of(path), wait=Wait(number=number, for_promised=for_promised))
        self.check(engine, reply)
        assert bool(reply.lease) == bool(reply.num_chunks + reply.num_pending)
        assert reply.num_chunks + reply.num_pending <= len(path)
        self.waits.append(reply)
        if not reply.lease:
            return multiple()
        self.alive[reply.lease] = self.now + TTL_S
        return engine, reply

    @rule(name=ENGINES)
    def hear_news(self, name: str) -> None:
        engine = self.engines[name]
        for news in self.store.waiting.news(AwaitChunks(session=engine.sessions[0], within_s=0)).news:
            before = self.waits[news.number - 1]
            assert before.num_pending, "a wait goes on that was over"
            assert news.match.num_chunks > before.num_chunks or not news.match.num_pending
            assert news.match.lease == before.lease
            assert before.lease in self.alive
            self.check(engine, news.match)
            assert news.match.frames[: len(before.frames)] == before.frames, "a leased chunk has moved"
            self.waits[news.number - 1] = news.match

    @rule(name=ENGINES, path=PATHS)
    def promise(self, name: str, path: tuple[int, ...]) -> None:
        reply = self.engines[name].match(prompt_of(path), lease=False, promise=True)
        assert bool(reply.promise) == (reply.num_chunks < len(path))
        self.promises[name].append(reply.promise)

    @rule(name=ENGINES, num_chunks=st.integers(0, 5))
    def end_promise(self, name: str, num_chunks: int) -> None:
        promise = self.promises[name].pop() if self.promises[name] else 0
        session = self.engines[name].sessions[0]
        self.store.waiting.end_promise(
            EndPromise(session=session, promise=promise, num_chunks=num_chunks, within_s=2.0)
        )

    def check(self, engine: Engine, reply: MatchReply) -> None:
        assert all(engine.check(reply)), "a promotion failed though nothing is wrong with the disk"
        for number, key in enumerate(keys_of(reply)[: reply.num_chunks]):
            assert self.committed[key] >= set(reply.tilings[reply.tiling_of[number]])

    @rule(one=held)
    def look_again(self, one: tuple[Engine, MatchReply]) -> None:
        engine, reply = one
        if reply.lease in self.alive and engine.store is self.store:
            self.check(engine, reply)

    @rule(one=consumes(held))
    def release(self, one: tuple[Engine, MatchReply]) -> None:
        engine, reply = one
        if engine is self.engines[engine.name] and engine.store is self.store:
            engine.release(reply)
            self.alive.pop(reply.lease, None)

    @rule(one=held)
    def renew(self, one: tuple[Engine, MatchReply]) -> None:
        engine, reply = one
        if engine is self.engines[engine.name] and engine.store is self.store:
            expired = self.store.renew(Renew(session=engine.sessions[0], leases=[reply.lease])).expired
            assert (reply.lease in expired) == (reply.lease not in self.alive)
            if not expired:
                self.alive[reply.lease] = self.now + TTL_S

    @rule(name=ENGINES, is_direct=st.booleans())
    def read_directly(self, name: str, is_direct: bool) -> None:
        self.engines[name].read_directly(1e9 * is_direct)

    @rule(name=ENGINES, path=PATHS)
    def ask(self, name: str, path: tuple[int, ...]) -> None:
        reply = self.engines[name].match(prompt_of(path), lease=False)
        assert reply.lease == 0
        assert all(self.committed[key] for key in keys_of(reply)[: reply.num_chunks])

    @rule(name=ENGINES, path=PATHS)
    def invalidate(self, name: str, path: tuple[int, ...]) -> None:
        engine = self.engines[name]
        reply = engine.match(prompt_of(path), lease=False)
        last = keys_of(reply)[-1]
        self.store.invalidate(Invalidate(session=engine.sessions[0], keys=last))
        again = engine.match(prompt_of(path), lease=False)
        assert again.num_chunks < len(path), "an invalidated chunk was found"
        self.committed[last].clear() if again.num_pending == 0 else None

    @rule(name=ENGINES)
    def die(self, name: str) -> None:
        before = self.store.stats().leases
        self.engines[name].close()
        lost = before - self.store.stats().leases
        self.alive = {lease: at for lease, at in self.alive.items() if not self.is_of(lease, name)}
        assert lost == before - len(self.alive)
        self.connect(name)

    def is_of(self, lease: int, name: str) -> bool:
        return lease not in {one.id for one in self.store._books.leases.leases()}

    @rule(seconds=st.floats(0.5, 6))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.store.expire()
        self.alive = {lease: at for lease, at in self.alive.items() if at > self.now}

    @rule()
    def flush(self) -> None:
        assert self.store.flush(20)

    @rule(is_clean=st.booleans())
    def restart(self, is_clean: bool) -> None:
        if is_clean:
            self.store.flush(20)
        before = self.store.stats()
        self.store.check_integrity()
        self.store.close(20)
        self.start()
        after = self.store.stats()
        assert after.chunks == after.chunks_durable
        if is_clean and not self.host_only:
            assert after.chunks_durable == before.chunks_durable

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "store"):
            return
        with self.store._books.lock:
            self.store._books.table.check_integrity()
            self.store._books.leases.check_integrity()
            self.store._storer.check_integrity()
            self.store._books.promises.check_integrity()
            self.store._books.waits.check_integrity(self.alive)
        stats = self.store.stats()
        assert stats.leases == len(self.alive)
        assert stats.bytes.host.used <= stats.bytes.host.limit
        assert stats.bytes.disk.used <= stats.bytes.disk.limit

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check_integrity()
        for engine in self.engines.values():
            engine.close()
        self.now += TTL_S
        self.store.expire()
        self.store.flush(20)
        self.store.check_integrity()
        stats = self.store.stats()
        assert stats.leases == stats.sessions == stats.chunks_pending == 0
        self.store.close()
        shutil.rmtree(self.folder)


class HostOnlyMachine(StoreMachine):
    """The same without a disk tier."""

    host_only = True


class QuotaMachine(StoreMachine):
    """The same when no tenant may take more than 40% of the arena."""

    quota = 0.4


QUICK = settings(
    max_examples=8, stateful_step_count=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
LONG = settings(QUICK, max_examples=150, stateful_step_count=60)

for machine in (StoreMachine, HostOnlyMachine, QuotaMachine):
    machine.TestCase.settings = QUICK
TestStore = StoreMachine.TestCase
TestHostOnly = HostOnlyMachine.TestCase
TestQuota = QuotaMachine.TestCase


@pytest.mark.slow
class TestStoreForLong(StoreMachine.TestCase):
    """Many more and longer histories."""

    settings = LONG
