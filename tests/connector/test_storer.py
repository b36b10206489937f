"""The storer: what is stored, what is dropped, and that every drop is counted."""

import threading
import time

import pytest

from cachetier.core.checksum import object_checksum
from cachetier.core.layout import frame_bytes
from cachetier_connector.arena_cache import ArenaCache
from cachetier_connector.plan import StoreOp, extras_of
from cachetier_connector.storer import Storer
from tests.connector.lazy_engine import LazyCopyEngine
from tests.connector.servers import (
    CHUNK,
    HALVES,
    LAYOUT,
    WHOLE,
    Blocks,
    blocks_for,
    connect,
    eventually,
    stats_of,
    store_op,
    tokens_of,
)

OBJECT_BYTES = LAYOUT.object_bytes(LAYOUT.whole(), CHUNK)
ENGINE, TABLE = Blocks().engine, blocks_for(4 * CHUNK)


def op(tier, tokens: list[int], **changes) -> StoreOp:
    return store_op(tier.namespace, tokens, TABLE, **changes)


def dropped(server) -> int:
    return stats_of(server)["stores_dropped"]


def test_objects_are_the_gathered_bytes_with_their_checksums(tier):
    tokens = tokens_of(1, 3 * CHUNK)
    storer, shards = tier.storer(ENGINE), ENGINE.gather(TABLE, 0, 3, CHUNK)
    storer.submit(op(tier, tokens))
    assert storer.stop()
    reply = tier.match(tokens)
    assert reply.num_chunks == 3
    arena = tier.arenas.get(tier.link.server.arena_path, tier.link.server.instance)
    for number, (frame, checksum) in enumerate(zip(reply.frames, reply.checksums, strict=True)):
        payload = arena.frame(frame, frame_bytes(OBJECT_BYTES))[:OBJECT_BYTES]
        assert payload == memoryview(shards[number].numpy())
        assert object_checksum(payload) == checksum


def test_a_chunk_is_held_once_all_ranks_stored_their_shard(tier):
    tokens = tokens_of(2, CHUNK)
    for number, shard in enumerate(HALVES):
        assert tier.match(tokens, lease=False).num_chunks == 0
        storer = tier.storer(Blocks(shard).engine, HALVES, number)
        storer.submit(op(tier, tokens))
        if number == 0:
            first = storer  # what a session that ends was storing is dropped
            eventually(lambda: stats_of(tier.server)["chunks_pending"] == 1)
        else:
            storer.stop()
    assert tier.match(tokens, lease=False).num_chunks == 1
    first.stop()


def test_later_parts_of_a_request_continue_its_chain(tier):
    tokens = tokens_of(3, 4 * CHUNK)
    storer = tier.storer(ENGINE)
    for start in range(0, 4, 2):
        part = tokens[start * CHUNK : (start + 2) * CHUNK]
        storer.submit(op(tier, part, position=start, parent=None if start else b""))
    storer.stop()
    assert tier.match(tokens, lease=False).num_chunks == 4


def test_a_chain_with_a_gap_or_without_a_start_is_dropped_and_counted(tier):
    tokens, before = tokens_of(4, 4 * CHUNK), dropped(tier.server)
    storer = tier.storer(ENGINE)
    storer.submit(op(tier, tokens[:CHUNK]))
    storer.submit(op(tier, tokens[2 * CHUNK :], position=2, parent=None))
    storer.submit(op(tier, tokens[CHUNK:], position=1, parent=None, request_id="unknown"))
    assert eventually(lambda: dropped(tier.server) - before) == 5
    storer.stop()
    assert tier.match(tokens, lease=False).num_chunks == 1


def test_a_finished_request_has_no_chain_to_continue(tier):
    tokens, before = tokens_of(5, 2 * CHUNK), dropped(tier.server)
    storer = tier.storer(ENGINE)
    storer.submit(op(tier, tokens[:CHUNK]))
    storer.finish(["r"], [])
    storer.submit(op(tier, tokens[CHUNK:], position=1, parent=None))
    assert eventually(lambda: dropped(tier.server) - before) == 1
    storer.stop()


@pytest.mark.parametrize("chunk_tokens", [CHUNK // 2, 2 * CHUNK])
def test_chunks_that_were_cut_for_another_server_are_dropped_and_counted(tier, chunk_tokens):
    tokens, before = tokens_of(5, 2 * CHUNK), dropped(tier.server)
    num_chunks = len(tokens) // chunk_tokens
    storer = tier.storer(ENGINE)
    storer.submit(op(tier, tokens, chunk_tokens=chunk_tokens))
    assert eventually(lambda: dropped(tier.server) - before) == num_chunks
    assert stats_of(tier.server)["chunks_pending"] == 0
    assert tier.match(tokens, lease=False).num_chunks == 0
    storer.stop()


def test_what_is_held_is_not_written_again(tier):
    tokens = tokens_of(6, CHUNK)
    for _ in range(2):
        storer = tier.storer(ENGINE)
        storer.submit(op(tier, tokens))
        storer.stop()
    before = stats_of(tier.server)["tokens"]["stored"]
    tier.store(tokens_of(7, CHUNK))
    assert stats_of(tier.server)["tokens"]["stored"] == before + CHUNK


def test_salts_and_multimodal_inputs_separate(tier):
    """The placeholders' tokens are the same, what stands for them is not."""
    tokens, image = tokens_of(8, 2 * CHUNK), extras_of([("image", 70, 10)], CHUNK)
    storer = tier.storer(ENGINE)
    storer.submit(op(tier, tokens, salt="one", extras=image))
    storer.stop()

    def held(salt, inputs):
        return tier.match(tokens, lease=False, salt=salt, extras=extras_of(inputs, CHUNK)).num_chunks

    assert held("one", [("image", 70, 10)]) == 2
    assert held("one", [("other image", 70, 10)]) == 1
    assert held("one", [("image", 71, 10)]) == 1
    assert held("one", [("image", 70, 10), ("image", 90, 10)]) == 1
    assert held("one", [("image", 20, 10)]) == 0
    assert held("one", []) == 1
    assert held("other", [("image", 70, 10)]) == 0
    assert held("", [("image", 70, 10)]) == 0


def test_what_does_not_fit_into_staging_memory_is_dropped_and_counted_until_it_comes_back(tier):
    before, is_free = dropped(tier.server), threading.Event()
    storer = tier.storer(ENGINE, staging_bytes=2 * OBJECT_BYTES)
    storer._jobs.put(lambda: is_free.wait(5))
    storer.submit(op(tier, tokens_of(9, 3 * CHUNK), request_id="too large"))
    storer.submit(op(tier, tokens_of(20, CHUNK), request_id="first"))
    storer.submit(op(tier, tokens_of(21, 2 * CHUNK), request_id="too late"))
    storer.submit(op(tier, tokens_of(22, CHUNK), request_id="second"))
    is_free.set()
    assert eventually(lambda: dropped(tier.server) - before) == 5
    storer.submit(op(tier, tokens_of(23, 2 * CHUNK), request_id="after"))
    storer.stop()
    held = [tier.match(tokens_of(seed, 3 * CHUNK), lease=False).num_chunks for seed in (9, 20, 21, 22, 23)]
    assert held == [0, 1, 0, 1, 2]


def test_what_waited_too_long_is_dropped_and_counted(tier):
    before, tokens = dropped(tier.server), tokens_of(10, CHUNK)
    storer = tier.storer(ENGINE, deadline_s=0.05)
    storer._jobs.put(lambda: time.sleep(0.2))
    storer.submit(op(tier, tokens))
    assert eventually(lambda: dropped(tier.server) - before) == 1
    storer.stop()
    assert tier.match(tokens, lease=False).num_chunks == 0


def test_a_failing_job_ends_neither_the_thread_nor_the_accounts(tier):
    storer = tier.storer(ENGINE, staging_bytes=OBJECT_BYTES)
    before = dropped(tier.server)
    storer.submit(store_op(b"short", tokens_of(11, CHUNK), TABLE))  # the server refuses it
    assert eventually(lambda: dropped(tier.server) - before) == 1
    tokens = tokens_of(12, CHUNK)
    storer.submit(op(tier, tokens))
    storer.stop()
    assert tier.match(tokens, lease=False).num_chunks == 1


def test_a_corrupt_chunk_is_reported_and_gone(tier):
    tokens = tokens_of(13, 2 * CHUNK)
    tier.store(tokens)
    keys, before = tier.match(tokens, lease=False).keys, stats_of(tier.server)["checksum_failures"]
    storer = tier.storer(ENGINE)
    storer.report_corrupt(keys[16:])
    storer.stop()
    assert stats_of(tier.server)["checksum_failures"] == before + 1
    assert tier.match(tokens, lease=False).num_chunks == 1


@pytest.mark.parametrize("tiling", [WHOLE, HALVES])
def test_nothing_is_left_pending_or_leased(tier, tiling):
    tier.store(tokens_of(14, 2 * CHUNK), tiling)
    stats = stats_of(tier.server)
    assert (stats["leases"], stats["chunks_pending"]) == (0, 0)


class Lazy:
    """A storer whose copy engine keeps blocks; its fills may be held before each chunk."""

    def __init__(self, tier) -> None:
        self.blocks = Blocks(engine_type=LazyCopyEngine)
        self.storer = tier.storer(self.blocks.engine)
        self.is_reading, self.may_read = threading.Event(), threading.Event()
        self.blocks.engine.before_chunk = self._before_chunk

    def _before_chunk(self) -> None:
        self.is_reading.set()
        assert self.may_read.wait(5)

    def overwrite(self) -> None:
        """Do what vLLM does with blocks that it has given to another request."""
        for cache in self.blocks.caches:
            cache.zero_()


@pytest.fixture
def lazy(tier):
    lazy = Lazy(tier)
    yield lazy
    lazy.may_read.set()
    assert lazy.storer.stop()


def test_kept_blocks_are_released_only_after_they_were_read(tier, lazy):
    tokens, expected = tokens_of(30, 3 * CHUNK), lazy.blocks.rows(TABLE, 0, 3 * CHUNK).clone()
    lazy.storer.submit(op(tier, tokens))
    lazy.storer.finish(["r", "other"], ["r"])
    assert lazy.is_reading.wait(5)
    time.sleep(0.05)
    assert lazy.storer.take_released() == set()
    lazy.may_read.set()
    assert eventually(lazy.storer.take_released) == {"r"}
    lazy.overwrite()
    reply = tier.match(tokens)
    arena = tier.arenas.get(tier.link.server.arena_path, tier.link.server.instance)
    stored = [bytes(arena.frame(frame, OBJECT_BYTES)) for frame in reply.frames]
    assert stored == [part.transpose(0, 1).contiguous().numpy().tobytes() for part in expected.split(CHUNK, dim=2)]
    assert lazy.storer.take_released() == set()


@pytest.mark.parametrize("reason", ["late", "no parent", "refused", "the copy fails"])
def test_blocks_of_stores_that_are_dropped_are_released_too(tier, lazy, reason):
    tokens, before = tokens_of(31, CHUNK), dropped(tier.server)
    store = op(tier, tokens, parent=None if reason == "no parent" else b"")
    if reason == "late":
        lazy.storer._jobs.put(lambda: time.sleep(1.1))
    if reason == "refused":
        store = store_op(b"short", tokens, TABLE)
    if reason == "the copy fails":
        lazy.blocks.engine.before_chunk = lambda: 1 / 0
    lazy.storer.submit(store)
    lazy.storer.finish(["r"], ["r"])
    assert eventually(lazy.storer.take_released) == {"r"}
    assert eventually(lambda: dropped(tier.server) - before) == 1
    assert tier.match(tokens, lease=False).num_chunks == stats_of(tier.server)["chunks_pending"] == 0


def test_a_cancelled_fill_is_waited_for_and_everything_after_its_present_chunk_is_dropped(tier, lazy):
    """And only of the requests that were named."""
    tokens, others, before = tokens_of(32, 4 * CHUNK), tokens_of(33, 2 * CHUNK), dropped(tier.server)
    lazy.storer.submit(op(tier, tokens[: 3 * CHUNK]))
    lazy.storer.submit(op(tier, tokens[3 * CHUNK :], position=3, parent=None))
    lazy.storer.submit(op(tier, others, request_id="other"))
    assert lazy.is_reading.wait(5)
    cancel = threading.Thread(target=lazy.storer.cancel, args=(["r"],))
    cancel.start()
    cancel.join(0.1)
    assert cancel.is_alive(), "the blocks were given away while they were read"
    lazy.may_read.set()
    cancel.join(5)
    assert not cancel.is_alive()
    assert eventually(lambda: dropped(tier.server) - before == 3)
    assert tier.match(tokens, lease=False).num_chunks == 1
    assert eventually(lambda: tier.match(others, lease=False).num_chunks == 2)


def test_nothing_is_read_after_a_cancel_that_had_nothing_to_wait_for(tier, lazy):
    tokens, before, is_free = tokens_of(34, CHUNK), dropped(tier.server), threading.Event()
    lazy.storer._jobs.put(lambda: is_free.wait(5))
    lazy.storer.submit(op(tier, tokens))
    lazy.storer.cancel(["r"])
    lazy.overwrite()
    is_free.set()
    assert eventually(lambda: dropped(tier.server) - before) == 1
    assert not lazy.is_reading.is_set()
    again = op(tier, tokens)  # after it was resumed
    lazy.may_read.set()
    lazy.storer.submit(again)
    assert eventually(lambda: tier.match(tokens, lease=False).num_chunks == 1)


def test_a_cancel_of_others_waits_for_nobody(tier, lazy):
    lazy.storer.submit(op(tier, tokens_of(35, CHUNK)))
    assert lazy.is_reading.wait(5)
    since_s = time.monotonic()
    lazy.storer.cancel(["other"])
    assert time.monotonic() - since_s < 0.5


def test_an_arena_is_mapped_before_anything_is_stored_or_loaded(tier):
    mapped = []
    storer = Storer(
        ENGINE, connect(tier.server), WHOLE, 0, ArenaCache(mapped.append), staging_bytes=OBJECT_BYTES, deadline_s=1.0
    )
    eventually(lambda: mapped)
    storer.stop()
    assert len(mapped) == 1
