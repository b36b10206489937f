"""The store on a disk that fails, fills up, flips bits and loses power, against a model.

Whatever the disk does: no call raises, a hit is what was stored or its reader finds out by the checksum, the books stay
right, and a chunk that was durable is there after a power loss unless the disk tier says where it went.
"""

import errno
import random
import shutil
import tempfile

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cachetier.core.checksum import digests_match, page_digests
from cachetier.core.layout import KVLayout, digests_offset, frame_bytes, num_pages
from cachetier.core.messages import Invalidate, MatchReply
from cachetier.store.store import Store
from tests.storage.fault_files import FaultFiles
from tests.store.chunks import CHUNK_TOKENS
from tests.store.engines import MIB, Engine, keys_of, make_config, payload_of, tokens_of

LAYOUT = KVLayout(num_layers=4, num_kv_heads=2, row_bytes=1024)  # 128 KiB a chunk: 29 in the arena, 80 on disk
SEGMENT_CHUNKS = 7
PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)


def prompt_of(path: tuple[int, ...]) -> bytes:
    return tokens_of(*(step + 10 * depth for depth, step in enumerate(path)))


class Machine(FaultFiles):
    """A disk that, once it lost power, answers nothing until `crash`."""

    is_down = False

    def _is_crash(self) -> bool:
        if not self.is_down and super()._is_crash():
            self.is_down = True
        return self.is_down

    def preadv(self, descriptor, buffers, offset):
        if self.is_down:
            raise OSError(errno.EIO, "no power")
        super().preadv(descriptor, buffers, offset)

    def crash(self) -> None:
        super().crash()
        self.is_down = False


class FaultMachine(RuleBasedStateMachine):
    """One engine, one store, one bad disk."""

    @initialize(seed=st.integers(0, 1000))
    def open(self, seed: int) -> None:
        self.folder = tempfile.mkdtemp()
        self.files, self.chance = Machine(seed), random.Random(seed)
        self.stored: set[bytes] = set()
        self.durable: set[bytes] = set()
        self.has_flipped = False
        self.start()

    def start(self) -> None:
        config = make_config(self.folder, disk_bytes=16 * MIB, host_bytes=4 * MIB)
        self.store = Store(config, files=self.files)
        self.engine = Engine(self.store, layout=LAYOUT)

    @rule(path=PATHS)
    def put(self, path: tuple[int, ...]) -> None:
        self.engine.put(prompt_of(path))
        self.stored |= set(keys_of(self.engine.match(prompt_of(path), lease=False)))

    @rule(path=PATHS)
    def load(self, path: tuple[int, ...]) -> None:
        reply = self.engine.match(prompt_of(path))
        damaged = self.damaged(reply)
        assert not damaged or self.has_flipped, "damage on a disk that flips no bits"
        if damaged:
            message = Invalidate(session=self.engine.sessions[0], keys=b"".join(damaged))
            self.store.invalidate(message)
            self.durable -= set(damaged)
        if reply.lease:
            self.engine.release(reply)

    def damaged(self, reply: MatchReply) -> list[bytes]:
        """Read all that is held, as an engine does; return the keys of what does not match its checksum."""
        damaged = []
        size = LAYOUT.object_bytes(LAYOUT.whole(), CHUNK_TOKENS)
        keys = keys_of(reply)[: reply.num_chunks]
        for key, offset, checksum in zip(keys, reply.frames, reply.checksums, strict=True):
            assert key in self.stored
            if not self.engine.await_frame(offset):
                self.durable.discard(key)  # reading it failed, and the tier forgot it
                continue
            frame, start = self.engine.frame(offset, frame_bytes(size)), digests_offset(size)
            digests = frame[start : start + num_pages(size) * 8]
            if not digests_match(digests, size, checksum) or page_digests(frame[:size]) != digests:
                damaged.append(key)
            else:
                assert frame[:size] == payload_of(key, LAYOUT.whole(), size), "wrong bytes under a right checksum"
        return damaged

    @rule()
    def flush(self) -> None:
        assert self.store.flush(20)
        self.note_durable()

    def note_durable(self) -> None:
        disk = self.store._books.disk
        if not self.files.is_down and not self.files.fail_reads:
            self.durable = {key for key in self.stored if disk.lookup(key)}

    @rule(after=st.integers(0, 12), error=st.sampled_from([errno.EIO, errno.ENOSPC]))
    def fail_once(self, after: int, error: int) -> None:
        self.files.fail_in, self.files.error = after, error

    @rule(is_failing=st.booleans())
    def fail_reads(self, is_failing: bool) -> None:
        self.files.fail_reads = is_failing

    @rule(seed=st.integers(0, 1 << 20))
    def flip_bits(self, seed: int) -> None:
        chance = random.Random(seed)
        segments = [data for name, data in self.files.contents().items() if name.endswith(".seg") and data]
        for data in segments:
            for _ in range(3):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        self.has_flipped |= bool(segments)

    @rule(paths=st.lists(PATHS, max_size=6), after=st.integers(0, 12))
    def lose_power(self, paths: list[tuple[int, ...]], after: int) -> None:
        self.files.fail_reads = False  # or what was evicted since it began could not be told from what gets lost
        self.flush()
        evicted = self.gone()
        self.files.fail_in, self.files.crash_in = -1, after
        for path in paths:
            self.put(path)
        self.store.flush(20)
        evicted = self.gone() - evicted
        disk = self.store.stats().bytes.disk
        if disk.used + 2 * MIB > disk.limit:  # power may have gone while the oldest segment was given up
            evicted += SEGMENT_CHUNKS
        self.abandon()
        self.files.crash()
        self.start()
        lost = {key for key in self.durable if self.store._books.disk.lookup(key) is None}
        assert len(lost) <= evicted or self.has_flipped, f"{len(lost)} durable chunks are gone, {evicted} evicted"
        self.note_durable()

    def gone(self) -> int:
        """Return how many chunks the disk tier says that it gave up."""
        counters = self.store.stats().disk
        return counters["evicted"] + counters["dropped"]

    def abandon(self) -> None:
        """Stop the threads and let go of the directory as a process that dies does: nothing more is written."""
        self.store._promoter.stop()
        self.store._flusher.stop()
        self.store._arena.close()
        self.store.data_dir.close()

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "store"):
            with self.store._books.lock:
                self.store._books.table.check_integrity()
            stats = self.store.stats()
            assert stats.bytes.disk.used <= stats.bytes.disk.limit

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        self.files.fail_in, self.files.fail_reads = -1, False
        self.engine.close()
        assert self.store.flush(20)
        stats = self.store.stats()
        assert stats.leases == stats.chunks_pending == stats.flush_backlog_bytes == 0
        self.store.close()
        shutil.rmtree(self.folder)


TestFaults = FaultMachine.TestCase
TestFaults.settings = settings(
    max_examples=8, stateful_step_count=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
