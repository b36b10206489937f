"""A state machine drives the disk tier over a failing disk and compares it with a dictionary."""

import contextlib
import errno

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cachetier.core.keys import ChainKey
from cachetier.storage.disk import ChunkToWrite, DiskTier
from cachetier.storage.index import IndexSettings
from cachetier.storage.namespaces import NamespaceTable
from cachetier.storage.segment_log import SegmentLog
from tests.storage.chunks import blank_frames, is_intact, make_chunk, objects
from tests.storage.fault_files import FaultFiles, SimulatedCrashError

FOLDER = "/data"
SHAPE = IndexSettings(limit_bytes=128 << 10, segment_bytes=128 << 10, num_segments=5, chunk_tokens=64)
LIMIT_BYTES = SHAPE.limit_bytes + SHAPE.num_segments * SHAPE.segment_bytes
CHUNKS = [make_chunk(seed, object_bytes=3000 + 1500 * (seed % 4), num_shards=1 + seed % 2) for seed in range(60)]
numbers = st.integers(0, len(CHUNKS) - 1)


class DiskMachine(RuleBasedStateMachine):
    """`durable` is the oracle: the chunks of which the tier said that they are stored, and where they stood last."""

    @initialize(seed=st.integers(0, 1 << 32))
    def start(self, seed: int) -> None:
        self.files = FaultFiles(seed)
        self.durable: dict[ChainKey, ChunkToWrite] = {}
        self.places: dict[ChainKey, int] = {}
        self.pinned: set[ChainKey] = set()
        self.hot: set[ChainKey] = set()
        self.is_count_exact = True
        self.open()

    def open(self) -> None:
        log = SegmentLog(FOLDER, SHAPE, self.files, self.hot.__contains__, self.pinned.__contains__)
        self.tier = DiskTier(log, NamespaceTable(FOLDER, self.files), LIMIT_BYTES)
        self.num_reclaimed = 0

    def find_all(self) -> dict[ChainKey, int]:
        found = {}
        for write in CHUNKS:
            location = self.tier._find(write.chunk.key)
            if location:
                assert location.chunk == write.chunk
                found[write.chunk.key] = location.sequence
        return found

    def settle(self, in_flight: set[ChainKey] = frozenset(), may_evict: bool = False, fails: bool = False) -> None:
        """Compare with the oracle, allowing what an operation that may have been cut short may leave."""
        places = self.find_all()
        missing = self.durable.keys() - places.keys()
        assert places.keys() - self.durable.keys() <= in_flight, "a chunk appeared from nowhere"
        if missing:
            assert may_evict, "a durable chunk is gone"
            assert fails or not missing & self.pinned, "a leased chunk is gone"
            newest_lost = max(self.places.get(key, 0) for key in missing)
            stayed = {key for key in self.places.keys() & places.keys() if self.places[key] == places[key]}
            assert all(places[key] > newest_lost for key in stayed), "eviction was not of whole, oldest segments"
        self.durable = {write.chunk.key: write for write in CHUNKS if write.chunk.key in places}
        self.pinned.intersection_update(places)
        self.places = places

    @rule(chosen=st.lists(numbers, max_size=12, unique=True))
    def append(self, chosen: list[int]) -> None:
        writes = [CHUNKS[number] for number in chosen]
        stored = self.tier.append(writes)
        for write, is_stored in zip(writes, stored, strict=True):
            assert is_stored or write.chunk.key in self.durable, "a healthy disk refuses nothing new"
            self.durable[write.chunk.key] = write
        self.settle_append({write.chunk.key for write in writes})

    def settle_append(self, in_flight: set[ChainKey], fails: bool = False) -> None:
        reclaimed = self.tier.counters.reclaimed_segments
        self.settle(in_flight, may_evict=reclaimed > self.num_reclaimed, fails=fails)
        self.num_reclaimed = reclaimed

    @rule(
        chosen=st.lists(numbers, min_size=1, max_size=12, unique=True),
        fail_in=st.integers(0, 30),
        error=st.sampled_from([errno.EIO, errno.ENOSPC]),
    )
    def append_to_failing_disk(self, chosen: list[int], fail_in: int, error: int) -> None:
        self.files.fail_in, self.files.error = fail_in, error
        self.is_count_exact = False
        writes = [CHUNKS[number] for number in chosen]
        stored = self.tier.append(writes)
        self.files.fail_in = -1
        for write, is_stored in zip(writes, stored, strict=True):
            if is_stored:
                self.durable[write.chunk.key] = write
        self.settle_append({write.chunk.key for write in writes}, fails=True)

    @rule(chosen=st.lists(numbers, min_size=1, max_size=12, unique=True), crash_in=st.integers(0, 30))
    def lose_power_in_append(self, chosen: list[int], crash_in: int) -> None:
        self.files.crash_in = crash_in
        writes = [CHUNKS[number] for number in chosen]
        with contextlib.suppress(SimulatedCrashError):
            self.tier.append(writes)
        self.is_count_exact = False
        self.files.crash()
        self.pinned.clear()  # leases do not outlive the server
        self.open()
        self.settle({write.chunk.key for write in writes}, may_evict=True)

    @rule()
    def lose_power(self) -> None:
        self.files.crash()
        self.open()
        self.settle()

    @rule()
    def restart(self) -> None:
        self.tier.close()
        self.open()
        self.settle()

    @precondition(lambda self: self.durable)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        keys = data.draw(st.lists(st.sampled_from(sorted(self.durable)), max_size=3, unique=True))
        assert self.tier.drop(keys) == len(keys)
        for key in keys:
            del self.durable[key]
            self.pinned.discard(key)
        self.settle()

    @precondition(lambda self: self.durable)
    @rule(data=st.data())
    def pin_and_heat(self, data: st.DataObject) -> None:
        """At most three pinned chunks: they fit into one segment, as leased chunks must."""
        self.pinned.clear()
        self.hot.clear()
        self.pinned |= set(data.draw(st.lists(st.sampled_from(sorted(self.durable)), max_size=3)))
        self.hot |= set(data.draw(st.lists(st.sampled_from(sorted(self.durable)), max_size=8)))

    @precondition(lambda self: self.durable)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        writes = [self.durable[key] for key in data.draw(st.lists(st.sampled_from(list(self.durable)), min_size=1))]
        frames = [blank_frames(write.chunk) for write in writes]
        assert all(self.tier.read_many([(write.chunk.key, each) for write, each in zip(writes, frames, strict=True)]))
        for write, each in zip(writes, frames, strict=True):
            assert is_intact(write.chunk, each)
            assert objects(write.chunk, each) == objects(write.chunk, write.frames)

    @precondition(lambda self: self.durable)
    @rule(data=st.data())
    def read_from_failing_disk(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.durable)))
        self.files.fail_reads = True
        assert not self.tier.read(key, blank_frames(self.durable[key].chunk))
        assert self.tier.lookup(key) is None
        self.files.fail_reads = False
        if self.tier.lookup(key) is None:  # the record could not be read, so the chunk was dropped
            del self.durable[key]
            self.pinned.discard(key)
        self.settle()

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "tier"):
            self.tier.check_integrity()
            if self.is_count_exact:
                assert self.tier.num_chunks == len(self.durable)
            used = sum(len(data) for name, data in self.files.contents().items())
            assert used == self.tier.used_bytes <= LIMIT_BYTES


DiskMachine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.generate],
)
TestDiskModel = DiskMachine.TestCase
