"""The GPU tier against a model: whatever happens in whatever order, a copy that a live lease names is the chunk's.

Device memory is played by dictionaries, so that every frame tells which chunk was last written to it. Writers behave as
workers do: they write while the load runs, and for one lease time longer when they have lost touch with the server. A
frame that was handed out too early is then overwritten under its reader, which `look_again` sees. Sessions die with
their process, which takes its memory along, or lose their connection, and the memory stays and is offered again.
"""

import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from cachetier.core.layout import KVLayout
from cachetier.core.messages import Invalidate, MatchReply, OpenSession, Renew, Trim
from cachetier.store.store import Store
from tests.store.engines import MIB, keys_of, make_config, tokens_of
from tests.store.pools import Memory, Pooled, fills_of, num_copies

LAYOUT = KVLayout(num_layers=4, num_kv_heads=2, row_bytes=2048)  # 256 KiB a chunk: 14 in the arena
TTL_S = 10.0
RANKS = {"one": 1, "two": 2, "other two": 2}
NAMES = st.sampled_from(sorted(RANKS))
PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=3).map(tuple)
RARELY = st.integers(0, 3).map(lambda number: number == 0)


def prompt_of(path: tuple[int, ...]) -> bytes:
    return tokens_of(*(step + 10 * depth for depth, step in enumerate(path)))


class Load:
    """A load under way: what a match said, and until when its ranks may write and have not yet."""

    def __init__(self, engine: Pooled, reply: MatchReply, handles: list[bytes], num_wanted: int) -> None:
        self.engine, self.reply, self.handles = engine, reply, handles
        self.sessions = list(engine.sessions)
        self.to_write = set(range(engine.num_ranks)) if reply.fill else set()
        self.to_commit: set[int] = set()
        self.num_wanted = num_wanted
        self.lives_until = 0.0
        self.writes_until = 0.0


class GpuMachine(RuleBasedStateMachine):
    """Engines with one and two ranks and a pool of three or four frames each."""

    loads = Bundle("loads")

    @initialize()
    def open(self) -> None:
        self.folder = tempfile.mkdtemp()
        self.now = 0.0
        config = make_config(self.folder, host_bytes=4 * MIB, disk_bytes=16 * MIB, lease_ttl_s=TTL_S)
        self.store = Store(config, clock=lambda: self.now)
        self.memory = Memory()
        self.alive: dict[int, Load] = {}
        self.engines = {name: Pooled(self.store, name, RANKS[name], layout=LAYOUT) for name in RANKS}
        for name, engine in self.engines.items():
            engine.give_pools(self.memory, num_frames=3 + (name == "two"))
        for path in ((0, 0), (0, 1), (1, 0), (1, 1)):
            self.put("one" if path == (1, 1) else "two", path)
        self.flush()  # what is being written to disk is in use

    @rule(name=NAMES, path=PATHS)
    def put(self, name: str, path: tuple[int, ...]) -> None:
        self.engines[name].put(prompt_of(path))

    @rule(name=NAMES, path=PATHS)
    def warm(self, name: str, path: tuple[int, ...]) -> None:
        num_copies(self.engines[name].warm(prompt_of(path)), self.memory)

    @rule(target=loads, name=NAMES, path=PATHS)
    def match(self, name: str, path: tuple[int, ...]) -> object:
        engine = self.engines[name]
        reply = engine.ask(prompt_of(path))
        num_copies(reply, self.memory)
        if not reply.lease:
            return multiple()
        load = Load(engine, reply, list(engine.handles), reply.num_chunks)
        load.lives_until = load.writes_until = self.now + TTL_S
        self.alive[reply.lease] = load
        return load

    @rule(load=loads, rank=st.integers(0, 1))
    def write_only(self, load: Load, rank: int) -> None:
        self.write(load, rank)

    def write(self, load: Load, rank: int) -> None:
        if rank not in load.to_write or self.now >= load.writes_until:
            return
        part = self.memory.parts.get(load.handles[rank])
        load.to_write.discard(rank)
        if part is not None:
            part.update({frame: key for key, frame in fills_of(load.reply)})
            load.to_commit.add(rank)

    @rule(load=loads, rank=st.integers(0, 1), drop=st.integers(0, 15))
    def commit(self, load: Load, rank: int, drop: int) -> None:
        self.write(load, rank)
        if rank not in load.to_commit:
            return
        load.to_commit.discard(rank)
        frames = [frame for number, (_, frame) in enumerate(fills_of(load.reply)) if not drop >> number & 1]
        load.engine.commit_fill(load.reply, rank, frames)

    @rule(load=loads)
    def look_again(self, load: Load) -> None:
        if load.reply.lease in self.alive:
            wanted, reply = load.num_wanted, load.reply
            num_copies(_first(reply, wanted), self.memory)

    @rule(load=consumes(loads), is_used=st.booleans())
    def release(self, load: Load, is_used: bool) -> None:
        if self.alive.pop(load.reply.lease, None) is not None:
            load.writes_until = self.now
            load.engine.release(load.reply, host_tokens=int(is_used))
            for rank in load.to_commit:  # the commits come behind the release
                load.engine.commit_fill(load.reply, rank)

    @rule(load=loads, num_chunks=st.integers(0, 4))
    def trim(self, load: Load, num_chunks: int) -> None:
        if load.reply.lease in self.alive:
            load.num_wanted = min(load.num_wanted, num_chunks)
            self.store.trim(Trim(session=load.sessions[0], lease=load.reply.lease, num_chunks=num_chunks))

    @rule(load=loads)
    def renew(self, load: Load) -> None:
        if load.reply.lease in self.alive:
            self.store.renew(Renew(session=load.sessions[0], leases=[load.reply.lease]))
            load.lives_until = load.writes_until = self.now + TTL_S

    @rule(name=NAMES, path=PATHS)
    def invalidate(self, name: str, path: tuple[int, ...]) -> None:
        engine = self.engines[name]
        last = keys_of(engine.match(prompt_of(path), lease=False))[-1]
        self.store.invalidate(Invalidate(session=engine.sessions[0], keys=last))

    @rule(name=NAMES, rank=st.integers(0, 1), is_lost=RARELY, is_killed=st.booleans())
    def lose(self, name: str, rank: int, is_lost: bool, is_killed: bool) -> None:
        if not is_lost:
            return
        engine = self.engines[name]
        rank %= engine.num_ranks
        self.store.close_session(engine.sessions[rank])
        if rank == 0:  # whose session has the leases
            for load in [load for load in self.alive.values() if load.engine is engine]:
                del self.alive[load.reply.lease]
                load.writes_until = self.now + TTL_S
        if is_killed:
            del self.memory.parts[engine.handles[rank]]
            engine.handles[rank] = self.memory.allocate()
        opened = self.store.open_session(OpenSession(client=f"worker {rank}", engine=name, pid=rank))
        engine.sessions[rank] = opened.session
        engine.offer(rank)

    @rule(name=NAMES, rank=st.integers(0, 1), num_frames=st.integers(2, 5), is_new=RARELY)
    def offer(self, name: str, rank: int, num_frames: int, is_new: bool) -> None:
        if not is_new:
            return
        engine = self.engines[name]
        engine.num_frames = num_frames
        engine.offer(rank % engine.num_ranks)

    @rule(seconds=st.floats(0.5, 6))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.store.expire()
        for load in [load for load in self.alive.values() if load.lives_until <= self.now]:
            del self.alive[load.reply.lease]
            load.writes_until = self.now + TTL_S

    @rule()
    def flush(self) -> None:
        assert self.store.flush(20)

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "store"):
            self.store.check_integrity()
            assert self.store.stats().leases == len(self.alive)

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        for engine in self.engines.values():
            engine.close()
        stats = self.store.stats()
        assert stats.chunks_gpu == stats.bytes.gpu.limit == 0
        self.now += TTL_S
        self.store.expire()
        self.store.check_integrity()
        assert not self.store._books.gpu._fills
        assert not self.store._books.gpu._dissolved
        self.store.close()
        shutil.rmtree(self.folder)


def _first(reply: MatchReply, num_chunks: int) -> MatchReply:
    """Return what a reply says of its first chunks' copies."""
    fields = {name: getattr(reply, name) for name in reply.__struct_fields__}
    fields["pool_of"], fields["pool_frames"] = reply.pool_of[:num_chunks], reply.pool_frames[:num_chunks]
    return MatchReply(**fields)


QUICK = settings(
    max_examples=15, stateful_step_count=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
GpuMachine.TestCase.settings = QUICK
TestGpuTier = GpuMachine.TestCase


@pytest.mark.slow
class TestGpuTierForLong(GpuMachine.TestCase):
    """Many more and longer histories."""

    settings = settings(QUICK, max_examples=150, stateful_step_count=60)
