"""The storer: what is stored, what is dropped, and that every drop is counted."""

import time

import pytest
import torch

from cachetier.core.checksum import object_checksum
from cachetier.core.layout import frame_bytes
from cachetier_connector import storer as storer_module
from cachetier_connector.plan import extras_of
from tests.connector.servers import (
    CHUNK,
    HALVES,
    LAYOUT,
    WHOLE,
    Blocks,
    blocks_for,
    eventually,
    stats_of,
    store_op,
    tokens_of,
)

OBJECT_BYTES = LAYOUT.object_bytes(LAYOUT.whole(), CHUNK)


def shards_of(num_chunks: int, seed: int = 0) -> torch.Tensor:
    blocks = blocks_for(num_chunks * CHUNK)
    return Blocks(seed=seed).engine.gather(blocks, 0, num_chunks, CHUNK)


def dropped(server) -> int:
    return stats_of(server)["stores_dropped"]


def test_objects_are_the_gathered_bytes_with_their_checksums(tier):
    tokens = tokens_of(1, 3 * CHUNK)
    storer, shards = tier.storer(), shards_of(3)
    storer.submit(store_op(tier.namespace, tokens, []), shards)
    storer.stop()
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
        storer = tier.storer(HALVES, number)
        gathered = Blocks(shard).engine.gather(blocks_for(CHUNK), 0, 1, CHUNK)
        storer.submit(store_op(tier.namespace, tokens, []), gathered)
        if number == 0:
            first = storer  # what a session that ends was storing is dropped
            eventually(lambda: stats_of(tier.server)["chunks_pending"] == 1)
        else:
            storer.stop()
    assert tier.match(tokens, lease=False).num_chunks == 1
    first.stop()


def test_later_parts_of_a_request_continue_its_chain(tier):
    tokens = tokens_of(3, 4 * CHUNK)
    storer = tier.storer()
    for start in range(0, 4, 2):
        part = tokens[start * CHUNK : (start + 2) * CHUNK]
        op = store_op(tier.namespace, part, [], position=start, parent=None if start else b"")
        storer.submit(op, shards_of(2, start))
    storer.stop()
    assert tier.match(tokens, lease=False).num_chunks == 4


def test_a_chain_with_a_gap_or_without_a_start_is_dropped_and_counted(tier):
    tokens, before = tokens_of(4, 4 * CHUNK), dropped(tier.server)
    storer = tier.storer()
    storer.submit(store_op(tier.namespace, tokens[:CHUNK], []), shards_of(1))
    late = store_op(tier.namespace, tokens[2 * CHUNK :], [], position=2, parent=None)
    storer.submit(late, shards_of(2))
    unknown = store_op(tier.namespace, tokens[CHUNK:], [], position=1, parent=None, request_id="unknown")
    storer.submit(unknown, shards_of(3))
    assert eventually(lambda: dropped(tier.server) - before) == 5
    storer.stop()
    assert tier.match(tokens, lease=False).num_chunks == 1


def test_a_finished_request_has_no_chain_to_continue(tier):
    tokens, before = tokens_of(5, 2 * CHUNK), dropped(tier.server)
    storer = tier.storer()
    storer.submit(store_op(tier.namespace, tokens[:CHUNK], []), shards_of(1))
    storer.finish(["r"])
    storer.submit(store_op(tier.namespace, tokens[CHUNK:], [], position=1, parent=None), shards_of(1))
    assert eventually(lambda: dropped(tier.server) - before) == 1
    storer.stop()


@pytest.mark.parametrize("chunk_tokens", [CHUNK // 2, 2 * CHUNK])
def test_chunks_that_were_cut_for_another_server_are_dropped_and_counted(tier, chunk_tokens):
    tokens, before = tokens_of(5, 2 * CHUNK), dropped(tier.server)
    num_chunks = len(tokens) // chunk_tokens
    shards = Blocks().engine.gather(blocks_for(len(tokens)), 0, num_chunks, chunk_tokens)
    storer = tier.storer()
    storer.submit(store_op(tier.namespace, tokens, [], chunk_tokens=chunk_tokens), shards)
    assert eventually(lambda: dropped(tier.server) - before) == num_chunks
    assert stats_of(tier.server)["chunks_pending"] == 0
    assert tier.match(tokens, lease=False).num_chunks == 0
    storer.stop()


def test_what_is_held_is_not_written_again(tier):
    tokens = tokens_of(6, CHUNK)
    for _ in range(2):
        storer = tier.storer()
        storer.submit(store_op(tier.namespace, tokens, []), shards_of(1))
        storer.stop()
    before = stats_of(tier.server)["tokens"]["stored"]
    tier.store(tokens_of(7, CHUNK))
    assert stats_of(tier.server)["tokens"]["stored"] == before + CHUNK


def test_salts_and_multimodal_inputs_separate(tier):
    """The placeholders' tokens are the same, what stands for them is not."""
    tokens, image = tokens_of(8, 2 * CHUNK), extras_of([("image", 70, 10)], CHUNK)
    storer = tier.storer()
    storer.submit(store_op(tier.namespace, tokens, [], salt="one", extras=image), shards_of(2))
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


def test_what_does_not_fit_into_staging_memory_is_dropped_and_counted(tier, monkeypatch):
    before = dropped(tier.server)
    storer = tier.storer(staging_bytes=2 * OBJECT_BYTES)
    assert storer.has_room(2, 2 * OBJECT_BYTES)
    assert not storer.has_room(3, 2 * OBJECT_BYTES + 1)
    assert eventually(lambda: dropped(tier.server) - before) == 3
    storer.submit(store_op(tier.namespace, tokens_of(9, 2 * CHUNK), []), shards_of(2))
    eventually(lambda: storer.has_room(0, 2 * OBJECT_BYTES))  # memory comes back
    storer.stop()


def test_what_waited_too_long_is_dropped_and_counted(tier, monkeypatch):
    monkeypatch.setattr(storer_module, "QUEUE_TIME_MAX_S", 0.05)
    before, tokens = dropped(tier.server), tokens_of(10, CHUNK)
    storer = tier.storer()
    storer._jobs.put(lambda: time.sleep(0.2))
    storer.submit(store_op(tier.namespace, tokens, []), shards_of(1))
    assert eventually(lambda: dropped(tier.server) - before) == 1
    storer.stop()
    assert tier.match(tokens, lease=False).num_chunks == 0


def test_a_failing_job_ends_neither_the_thread_nor_the_accounts(tier):
    storer = tier.storer(staging_bytes=OBJECT_BYTES)
    before = dropped(tier.server)
    storer.submit(store_op(b"short", tokens_of(11, CHUNK), []), shards_of(1))  # the server refuses it
    assert eventually(lambda: dropped(tier.server) - before) == 1
    assert storer.has_room(1, OBJECT_BYTES)
    tokens = tokens_of(12, CHUNK)
    storer.submit(store_op(tier.namespace, tokens, []), shards_of(1))
    storer.stop()
    assert tier.match(tokens, lease=False).num_chunks == 1


def test_a_corrupt_chunk_is_reported_and_gone(tier):
    tokens = tokens_of(13, 2 * CHUNK)
    tier.store(tokens)
    keys, before = tier.match(tokens, lease=False).keys, stats_of(tier.server)["checksum_failures"]
    storer = tier.storer()
    storer.report_corrupt(keys[16:])
    storer.stop()
    assert stats_of(tier.server)["checksum_failures"] == before + 1
    assert tier.match(tokens, lease=False).num_chunks == 1


@pytest.mark.parametrize("tiling", [WHOLE, HALVES])
def test_nothing_is_left_pending_or_leased(tier, tiling):
    tier.store(tokens_of(14, 2 * CHUNK), tiling)
    stats = stats_of(tier.server)
    assert (stats["leases"], stats["chunks_pending"]) == (0, 0)
