"""The loader: stored bytes arrive whatever the layouts, and a frame that is bad in any way becomes failed blocks."""

import random
import threading
import time
from typing import ClassVar

import pytest
import torch
from msgspec.structs import replace

from bench.gpu.profile import LOADED
from cachetier.core.arena_format import STATE_BAD, STATE_FILLING, STATE_READY
from cachetier.core.layout import PAGE_BYTES, Shard, digests_offset
from cachetier_blend.rotation import Rotary, rotate
from cachetier_connector import loader as loader_module
from cachetier_connector.copy_cpu import CpuLoadRun
from cachetier_connector.loader import Loader
from cachetier_connector.plan import HeldChunks
from tests.connector.servers import (
    BLOCK,
    CHUNK,
    HALVES,
    HEAD_SIZE,
    LAYOUT,
    WHOLE,
    Blocks,
    blocks_for,
    eventually,
    tokens_of,
)

STAGES = [Shard(0, 2, 0, 1), Shard(0, 2, 1, 2)]
QUARTERS = [Shard(head, head + 1, layer, layer + 1) for layer in (0, 1) for head in (0, 1)]
TILINGS = {"whole": WHOLE, "halves": HALVES, "stages": STAGES, "quarters": QUARTERS}
OBJECT_BYTES = LAYOUT.object_bytes(LAYOUT.whole(), CHUNK)


class Loading:
    """A loader with its blocks, and what it reported."""

    def __init__(self, tier, shard=WHOLE[0], stall_s=2.0) -> None:
        self.blocks, self.corrupt = Blocks(shard, seed=99), []
        self.before = Blocks(shard, seed=99)
        self.loader = Loader(self.blocks.engine, tier.arenas, stall_s=stall_s, report_corrupt=self.corrupt.append)

    def load(self, op) -> set[int]:
        """Carry `op` out; return the bad blocks."""
        self.loader.submit(op)
        assert eventually(self.loader.take_finished) == {op.request_id}
        return self.loader.take_bad_blocks()


def arena_of(tier):
    return tier.arenas.get(tier.link.server.arena_path, tier.link.server.instance)


def set_state(tier, frame: int, state: int) -> None:
    arena = arena_of(tier)
    arena._memory[arena.geometry.state_offset + frame // PAGE_BYTES] = state


@pytest.mark.parametrize("stored_as", TILINGS)
@pytest.mark.parametrize("loaded_as", TILINGS)
def test_every_layout_loads_what_any_layout_stored(tier, stored_as, loaded_as):
    tokens, blocks = tokens_of(1, 5 * CHUNK), blocks_for(5 * CHUNK, seed=7)
    stored = tier.store(tokens, TILINGS[stored_as], seed=7)
    reply = tier.match(tokens)
    assert reply.num_chunks == 5
    for shard in TILINGS[loaded_as]:
        loading = Loading(tier, shard)
        assert loading.load(tier.load_op(reply, 0, 5 * CHUNK, blocks)) == set()
        wanted = stored[shard.layer_start : shard.layer_end, shard.head_start : shard.head_end]
        assert torch.equal(loading.blocks.rows(blocks, 0, 5 * CHUNK), wanted)
        loading.loader.stop()


@pytest.mark.parametrize("seed", range(6))
def test_only_the_wanted_tokens_are_written(tier, seed):
    rng = random.Random(seed)
    start = rng.randrange(0, 300)
    end = rng.randrange(start + 1, 20 * CHUNK // 2)
    tokens, blocks = tokens_of(100 + seed, 10 * CHUNK), blocks_for(10 * CHUNK, seed)
    stored, reply = tier.store(tokens), tier.match(tokens)
    loading = Loading(tier)
    assert loading.load(tier.load_op(reply, start, end, blocks)) == set()
    expected = loading.before.rows(blocks, 0, 10 * CHUNK).clone()
    expected[:, :, start:end] = stored[:, :, start:end]
    assert torch.equal(loading.blocks.rows(blocks, 0, 10 * CHUNK), expected)
    loading.loader.stop()


def test_the_end_of_a_load_is_waited_for_and_nothing_when_none_is_under_way(tier):
    tokens = tokens_of(30, 2 * CHUNK)
    tier.store(tokens)
    reply, loading = tier.match(tokens), Loading(tier)
    start = time.monotonic()
    assert loading.loader.take_finished(wait_s=5) == set()
    set_state(tier, reply.frames[0], STATE_FILLING)
    loading.loader.submit(tier.load_op(reply, 0, 2 * CHUNK, blocks_for(2 * CHUNK, 1)))
    threading.Timer(0.1, set_state, (tier, reply.frames[0], STATE_READY)).start()
    assert len(loading.loader.take_finished(wait_s=5)) == 1
    assert 0.1 <= time.monotonic() - start < 4
    assert loading.loader.take_finished(wait_s=5) == set()
    assert time.monotonic() - start < 4
    loading.loader.stop()


@pytest.mark.parametrize("stored_as", ["whole", "halves"])
@pytest.mark.parametrize("is_first_slow", [True, False])
def test_a_load_in_pieces_has_ended_when_the_last_was_submitted_and_all_have_ended(tier, is_first_slow, stored_as):
    tokens, blocks = tokens_of(32, 4 * CHUNK), blocks_for(4 * CHUNK, 1)
    stored = tier.store(tokens, TILINGS[stored_as])
    reply, loading = tier.match(tokens), Loading(tier)
    slow = reply.frames[0 if is_first_slow else -1]
    set_state(tier, slow, STATE_FILLING)
    loading.loader.submit(replace(tier.load_op(reply, 0, 3 * CHUNK, blocks), is_last=False))
    if not is_first_slow:
        eventually(loading.loader.take_seconds)
        assert loading.loader.take_finished(wait_s=0.05) == set()
    loading.loader.submit(tier.load_op(reply, 3 * CHUNK, 4 * CHUNK, blocks))
    time.sleep(0.05)
    assert loading.loader.take_finished() == set()
    set_state(tier, slow, STATE_READY)
    assert eventually(loading.loader.take_finished) == {"r"}
    assert loading.loader.take_bad_blocks() == set()
    assert torch.equal(loading.blocks.rows(blocks, 0, 4 * CHUNK), stored)
    assert loading.load(tier.load_op(reply, 0, CHUNK, blocks)) == set(), "the next load of the request is whole"
    loading.loader.stop()


def test_a_last_piece_without_chunks_fails_its_blocks_and_touches_none(tier):
    tokens, blocks = tokens_of(33, 4 * CHUNK), blocks_for(4 * CHUNK, 1)
    stored = tier.store(tokens)
    reply, loading = tier.match(tokens), Loading(tier)
    loading.loader.submit(replace(tier.load_op(reply, 0, 2 * CHUNK, blocks), is_last=False))
    nothing = replace(tier.load_op(reply, 2 * CHUNK, 4 * CHUNK, blocks), chunks=HeldChunks(b"", b"", [], []))
    assert loading.load(nothing) == set(blocks[2 * CHUNK // BLOCK :])
    expected = loading.before.rows(blocks, 0, 4 * CHUNK).clone()
    expected[:, :, : 2 * CHUNK] = stored[:, :, : 2 * CHUNK]
    assert torch.equal(loading.blocks.rows(blocks, 0, 4 * CHUNK), expected)
    loading.loader.stop()


def test_the_log_says_where_the_time_of_a_load_went(tier, monkeypatch):
    tokens, lines = tokens_of(31, 3 * CHUNK), []
    monkeypatch.setattr(loader_module.log, "debug", lambda text, *values: lines.append(text % values))
    tier.store(tokens)
    reply, loading = tier.match(tokens), Loading(tier)
    set_state(tier, reply.frames[0], STATE_FILLING)
    threading.Timer(0.1, set_state, (tier, reply.frames[0], STATE_READY)).start()
    assert loading.load(tier.load_op(reply, 0, 3 * CHUNK, blocks_for(3 * CHUNK, 1))) == set()
    [found] = filter(None, map(LOADED.search, lines))
    count, queued_ms, pushed_ms, settled_ms, _ = map(float, found.groups())
    assert count == 3
    assert 0 <= queued_ms < 80 <= pushed_ms
    assert settled_ms >= 0
    loading.loader.stop()


def spoil_payload(tier, frame):
    arena_of(tier).frame(frame + 5000, 1)[0] ^= 1


def spoil_digests(tier, frame):
    arena_of(tier).frame(frame + digests_offset(OBJECT_BYTES) + 3, 1)[0] ^= 1


def say_bad(tier, frame):
    set_state(tier, frame, STATE_BAD)


def say_filling(tier, frame):
    set_state(tier, frame, STATE_FILLING)


@pytest.mark.parametrize("fault", [spoil_payload, spoil_digests, say_bad, say_filling])
@pytest.mark.parametrize("bad_chunk", [0, 3, 19])
def test_a_bad_frame_fails_the_blocks_from_its_chunk_on_and_no_others(tier, fault, bad_chunk):
    """Also beyond the first 16 chunks, which are verified and written before the others are read."""
    num_tokens = 20 * CHUNK
    tokens, table = tokens_of(2, num_tokens), blocks_for(num_tokens)
    tier.store(tokens)
    reply = tier.match(tokens)
    fault(tier, reply.frames[bad_chunk])
    loading = Loading(tier, stall_s=0.1)
    bad = loading.load(tier.load_op(reply, 0, num_tokens - 1, table))
    assert bad == set(table[bad_chunk * CHUNK // BLOCK :])
    expected_reports = [reply.keys[bad_chunk * 16 : bad_chunk * 16 + 16]] if "spoil" in fault.__name__ else []
    assert loading.corrupt == expected_reports
    untouched = loading.before.rows(table, bad_chunk * CHUNK, num_tokens)
    assert torch.equal(loading.blocks.rows(table, bad_chunk * CHUNK, num_tokens), untouched)
    loading.loader.stop()


def test_any_flipped_bit_that_a_rank_would_use_is_noticed_and_no_other_is_its_business(tier):
    tokens, blocks, rng = tokens_of(3, CHUNK), blocks_for(CHUNK), random.Random(3)
    stored, reply = tier.store(tokens), tier.match(tokens)
    frame = arena_of(tier).frame(reply.frames[0], OBJECT_BYTES)
    loading = Loading(tier, HALVES[1])
    for offset in [0, OBJECT_BYTES // 2 - 1, OBJECT_BYTES // 2, OBJECT_BYTES - 1, *rng.sample(range(OBJECT_BYTES), 30)]:
        frame[offset] ^= 1 << rng.randrange(8)
        before = bytes(frame[offset : offset + 1])
        bad = loading.load(tier.load_op(reply, 0, CHUNK, blocks))
        assert bad == (set(blocks) if offset >= OBJECT_BYTES // 2 else set()), offset
        frame[offset] = before[0]
        frame[:] = original(stored)
    loading.loader.stop()


def original(stored: torch.Tensor) -> bytes:
    """Return the canonical bytes of rows `[layers, heads, tokens, 2, head_size]`."""
    return stored.transpose(0, 1).contiguous().numpy().tobytes()


def test_a_frame_that_becomes_ready_in_time_is_waited_for(tier):
    tokens, blocks = tokens_of(4, 2 * CHUNK), blocks_for(2 * CHUNK)
    stored, reply = tier.store(tokens), tier.match(tokens)
    set_state(tier, reply.frames[1], STATE_FILLING)
    loading, since = Loading(tier), time.monotonic()
    threading.Timer(0.2, set_state, (tier, reply.frames[1], STATE_READY)).start()
    assert loading.load(tier.load_op(reply, 0, 2 * CHUNK, blocks)) == set()
    assert time.monotonic() - since >= 0.2
    assert torch.equal(loading.blocks.rows(blocks, 0, 2 * CHUNK), stored)
    loading.loader.stop()


def test_a_frame_that_never_becomes_ready_is_given_up_after_the_deadline(tier):
    tokens, blocks = tokens_of(5, CHUNK), blocks_for(CHUNK)
    tier.store(tokens)
    reply = tier.match(tokens)
    set_state(tier, reply.frames[0], STATE_FILLING)
    loading, since = Loading(tier, stall_s=0.3), time.monotonic()
    assert loading.load(tier.load_op(reply, 0, CHUNK, blocks)) == set(blocks)
    assert 0.3 <= time.monotonic() - since < 1.5
    loading.loader.stop()


def test_an_arena_that_is_gone_fails_the_whole_load_and_not_the_next_one(tier):
    tokens, blocks = tokens_of(6, CHUNK), blocks_for(CHUNK)
    tier.store(tokens)
    op = tier.load_op(tier.match(tokens), 0, CHUNK, blocks)
    loading = Loading(tier)
    assert loading.load(replace(op, arena_path="/nowhere/arena", instance="other")) == set(blocks)
    assert loading.load(op) == set()
    loading.loader.stop()


def test_a_reply_that_makes_no_sense_fails_its_load_and_not_the_thread(tier):
    tokens, blocks = tokens_of(7, CHUNK), blocks_for(CHUNK)
    tier.store(tokens)
    op = tier.load_op(tier.match(tokens), 0, CHUNK, blocks)
    outside = replace(op.chunks, frames=[1 << 40])
    loading = Loading(tier)
    assert loading.load(replace(op, chunks=outside)) == set(blocks)
    assert loading.load(op) == set()
    loading.loader.stop()


class FailingRun(CpuLoadRun):
    """Fails at its second push, and remembers what it was asked."""

    log: ClassVar[list[str]] = []

    def push(self, group):
        self.log.append("push")
        if len(self.log) == 2:
            raise RuntimeError("the device is gone")
        super().push(group)

    def finish(self):
        self.log.append("finish")
        return super().finish()


def test_a_run_that_fails_is_finished_before_its_blocks_are_given_up(tier, monkeypatch):
    """Else a device might still write to blocks that belong to others."""
    tokens, table = tokens_of(8, 16 * CHUNK), blocks_for(16 * CHUNK)
    tier.store(tokens)
    op = tier.load_op(tier.match(tokens), 0, 16 * CHUNK, table)
    loading = Loading(tier)
    engine = loading.blocks.engine
    monkeypatch.setattr(loader_module, "GROUP_CHUNKS", 4)
    monkeypatch.setattr(engine, "open_load", lambda arena, load, _: FailingRun(engine, LAYOUT, WHOLE[0], arena, load))
    assert loading.load(op) == set(table)
    assert FailingRun.log == ["push", "push", "finish"]
    loading.loader.stop()


def test_each_load_is_opened_with_its_own_fence(tier, monkeypatch):
    tokens, blocks = tokens_of(9, CHUNK), blocks_for(CHUNK)
    tier.store(tokens)
    op = tier.load_op(tier.match(tokens), 0, CHUNK, blocks)
    loading, seen = Loading(tier), []
    engine, open_load = loading.blocks.engine, loading.blocks.engine.open_load

    def open_and_remember(arena, load, fence):
        seen.append(fence)
        return open_load(arena, load, None)

    monkeypatch.setattr(engine, "open_load", open_and_remember)
    loading.loader.submit(op, "fence")
    assert eventually(loading.loader.take_finished) == {op.request_id}
    assert loading.load(op) == set()
    assert seen == ["fence", None]
    loading.loader.stop()


def test_a_load_waits_for_frames_no_longer_than_it_has_patience_and_keeps_what_came(tier):
    """However steadily they come: each of them within the time after which a load counts as stalled."""
    tokens, blocks = tokens_of(30, 4 * CHUNK), blocks_for(4 * CHUNK)
    stored, reply = tier.store(tokens), tier.match(tokens)
    for frame in reply.frames[1:]:
        set_state(tier, frame, STATE_FILLING)
    for number, frame in enumerate(reply.frames[1:]):
        threading.Timer(0.1 + 0.4 * number, set_state, (tier, frame, STATE_READY)).start()
    loading = Loading(tier)
    load = replace(tier.load_op(reply, 0, 4 * CHUNK, blocks), patience_s=0.3)
    assert loading.load(load) == set(blocks[2 * CHUNK // BLOCK :])
    assert 0.3 <= loading.loader.take_seconds()["r"] < 0.5
    assert loading.loader.take_seconds() == {}
    assert torch.equal(loading.blocks.rows(blocks, 0, 2 * CHUNK), stored[:, :, : 2 * CHUNK])
    loading.loader.stop()
    time.sleep(0.8)  # the timers end before the next test


def test_a_load_that_waits_for_nothing_needs_no_patience(tier):
    tokens, blocks = tokens_of(31, 20 * CHUNK), blocks_for(20 * CHUNK)
    tier.store(tokens)
    loading = Loading(tier)
    load = replace(tier.load_op(tier.match(tokens), 0, 20 * CHUNK, blocks), patience_s=0.0)
    assert loading.load(load) == set()
    loading.loader.stop()


def shifted(op, shift: int):
    """Return a load of the same chunks for tokens `shift` further on."""
    return replace(op, start=op.start + shift, end=op.end + shift, shift=shift)


ROTARY = Rotary(tuple(0.7**n for n in range(HEAD_SIZE // 2)), is_interleaved=False, rotary_dim=HEAD_SIZE)


@pytest.mark.parametrize("loaded_as", ["whole", "halves", "stages"])
@pytest.mark.parametrize(("shift", "start", "end"), [(37, 0, 20 * CHUNK), (500, 16, 1000), (64, 70, 100), (1, 63, 65)])
def test_a_shifted_load_writes_turned_keys_to_the_shifted_tokens_and_nowhere_else(tier, loaded_as, shift, start, end):
    """Also over several groups of chunks."""
    tokens, blocks = tokens_of(40, 20 * CHUNK), blocks_for(20 * CHUNK + shift, seed=4)
    stored = tier.store(tokens).view(torch.bfloat16)
    reply = tier.match(tokens)
    for shard in TILINGS[loaded_as]:
        loading = Loading(tier, shard)
        loading.blocks.engine.use_rotary(ROTARY)
        assert loading.load(shifted(tier.load_op(reply, start, end, blocks), shift)) == set()
        wanted = stored[shard.layer_start : shard.layer_end, shard.head_start : shard.head_end, start:end]
        expected = loading.before.rows(blocks, 0, len(blocks) * BLOCK).view(torch.bfloat16)
        expected[:, :, start + shift : end + shift, 1] = wanted[..., 1, :]
        expected[:, :, start + shift : end + shift, 0] = rotate(wanted[..., 0, :], shift, ROTARY)
        found = loading.blocks.rows(blocks, 0, len(blocks) * BLOCK).view(torch.bfloat16)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        loading.loader.stop()


def test_a_shifted_load_fails_where_it_is_not_known_how_keys_turn_and_the_next_load_does_not(tier):
    tokens, blocks = tokens_of(41, 2 * CHUNK), blocks_for(4 * CHUNK)
    tier.store(tokens)
    op, loading = tier.load_op(tier.match(tokens), 0, 2 * CHUNK, blocks), Loading(tier)
    assert loading.load(shifted(op, 64)) == set(blocks[2:6])
    assert torch.equal(loading.blocks.rows(blocks, 0, 4 * CHUNK), loading.before.rows(blocks, 0, 4 * CHUNK))
    assert loading.load(op) == set()
    loading.loader.stop()


class TestParts:
    """Loads of requests that are blended: what is missing is no failure but is to be computed."""

    @pytest.fixture
    def loading(self, tier):
        loading = Loading(tier, stall_s=0.1)
        loading.blocks.engine.use_rotary(ROTARY)
        yield loading
        loading.loader.stop()

    def op_of(self, tier, part: int, seed: int = 50, shift: int = 100):
        """Return a part that loads tokens 16 to 250 of a document, and the document's frames."""
        tokens = tokens_of(seed, 4 * CHUNK)
        tier.store(tokens)
        reply = tier.match(tokens)
        op = tier.load_op(reply, 16, 250, blocks_for(1024))
        return replace(shifted(op, shift), part=part), reply.frames

    def ended(self, loading, op) -> int:
        """Carry a part out; return up to which token it says that it loaded."""
        loading.loader.submit(op)
        parts = eventually(loading.loader.take_parts)
        assert parts.keys() == {"r"}
        assert parts["r"].keys() == {op.part}
        return parts["r"][op.part]

    def test_parts_are_reported_by_their_numbers_and_the_request_as_not_finished(self, tier, loading):
        for part, shift in ((0, 100), (3, 500)):
            op, _ = self.op_of(tier, part, 50 + part, shift)
            loading.loader.submit(op)
        found: dict[int, int] = {}
        eventually(lambda: found.update(loading.loader.take_parts().get("r", {})) or len(found) == 2)
        assert found == {0: 350, 3: 750}
        assert loading.loader.take_finished() == set()
        assert loading.loader.take_parts() == {}
        assert loading.loader.take_seconds().keys() == {"r"}

    @pytest.mark.parametrize(("bad_chunk", "end"), [(0, 116), (1, 164), (3, 292)])
    def test_a_part_ends_before_its_first_bad_chunk_and_spoils_no_blocks(self, tier, loading, bad_chunk, end):
        op, frames = self.op_of(tier, 1, 60 + bad_chunk)
        spoil_payload(tier, frames[bad_chunk])
        assert self.ended(loading, op) == end
        assert loading.loader.take_bad_blocks() == set()
        assert len(loading.corrupt) == 1

    def test_of_a_part_that_cannot_be_loaded_at_all_nothing_is(self, tier, loading):
        op, _ = self.op_of(tier, 0)
        assert self.ended(loading, replace(op, arena_path="/nowhere/arena", instance="other")) == 116
        loading.blocks.engine.rotary = None
        assert self.ended(loading, op) == 116
        assert loading.loader.take_bad_blocks() == set()

    def test_parts_that_were_taken_are_not_waited_for(self, tier, loading):
        op, _ = self.op_of(tier, 0)
        assert self.ended(loading, op) == 350
        since = time.monotonic()
        for _ in range(2):  # the first may still see that something has ended
            assert loading.loader.take_finished(wait_s=5) == set()
        assert time.monotonic() - since < 4

    def test_the_end_of_a_part_ends_the_wait_for_loads(self, tier, loading):
        """The engine has nothing else to do, and the runs before later parts can be computed."""
        op, frames = self.op_of(tier, 0)
        set_state(tier, frames[0], STATE_FILLING)
        threading.Timer(0.05, set_state, (tier, frames[0], STATE_READY)).start()
        since = time.monotonic()
        loading.loader.submit(op)
        assert loading.loader.take_finished(wait_s=5) == set()
        assert time.monotonic() - since < 4
        assert loading.loader.take_parts() == {"r": {0: 350}}
