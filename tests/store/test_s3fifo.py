"""S3-FIFO on its own: order, second chances, ghosts, scans."""

import random
from collections.abc import Iterator

import pytest

from cachetier.store.chunk import HITS_MAX, HostChunk
from cachetier.store.s3fifo import MEMORY_S, S3Fifo
from tests.store.chunks import make_arena, make_chunk, make_tiling


@pytest.fixture
def chunk_of(tmp_path):
    arena = make_arena(tmp_path)
    tiling = make_tiling(arena)
    made: dict[int, HostChunk] = {}
    yield lambda number: made.setdefault(number, make_chunk(tiling, number))
    arena.close()


class Cache:
    """A cache of `capacity` chunks that evicts as the store does."""

    def __init__(self, capacity: int, chunk_of, seconds_an_access: float = 0.0) -> None:
        self.queues, self.capacity, self.chunk_of = S3Fifo(lambda: self.now_s), capacity, chunk_of
        self.now_s, self.seconds_an_access = 0.0, seconds_an_access
        self.held: dict[int, HostChunk] = {}

    def access(self, number: int) -> bool:
        self.now_s += self.seconds_an_access
        if number in self.held:
            self.held[number].used_at_s = self.now_s
            self.held[number].hits = min(self.held[number].hits + 1, HITS_MAX)
            return True
        if len(self.held) == self.capacity:
            victim = self.queues.victim(lambda chunk: chunk)
            self.queues.remove(victim, remember=True)
            self.held = {n: chunk for n, chunk in self.held.items() if chunk is not victim}
        self.held[number] = self.chunk_of(number)
        self.held[number].hits, self.held[number].used_at_s = 0, self.now_s
        self.queues.add(self.held[number])
        self.queues.check_integrity()
        return False


def victims(queues: S3Fifo) -> Iterator[int]:
    while (victim := queues.victim(lambda chunk: chunk)) is not None:
        queues.remove(victim, remember=True)
        yield int.from_bytes(victim.key, "little")


def test_chunks_that_were_never_hit_leave_in_the_order_in_which_they_came(chunk_of):
    queues = S3Fifo(lambda: 0.0)
    for number in range(20):
        queues.add(chunk_of(number))
    assert list(victims(queues)) == list(range(20))
    assert queues.victim(lambda chunk: chunk) is None


def test_a_chunk_that_was_hit_outlives_those_that_were_not(chunk_of):
    queues = S3Fifo(lambda: 0.0)
    for number in range(20):
        queues.add(chunk_of(number))
    chunk_of(3).hits = 1
    order = list(victims(queues))
    assert order[-1] == 3


def test_a_key_that_comes_back_while_it_is_remembered_enters_the_main_queue(chunk_of):
    cache = Cache(20, chunk_of)
    for number in range(30):
        cache.access(number)
    assert 8 not in cache.held
    cache.access(8)
    for number in range(100, 120):
        cache.access(number)
    assert 8 in cache.held


def test_a_hot_set_survives_a_scan_of_ten_times_the_cache(chunk_of):
    cache, seed = Cache(100, chunk_of), random.Random(1)
    for _ in range(600):
        cache.access(seed.randrange(50))
    for number in range(1000, 2000):
        cache.access(number)
    assert sum(number in cache.held for number in range(50)) == 50


def test_documents_of_the_afternoon_stay_though_those_of_the_morning_were_hit_again_and_again(chunk_of):
    cache = Cache(100, chunk_of, seconds_an_access=1)
    for _ in range(10):
        for number in range(60):
            cache.access(number)
    for number in range(1000, 1200):  # nobody asks for them twice
        cache.access(number)
    for number in range(2000, 2090):
        cache.access(number)
    assert sum(cache.access(number) for number in range(2000, 2090)) >= 85


def test_a_scan_that_takes_less_than_a_minute_makes_no_hit_forgotten(chunk_of):
    cache = Cache(100, chunk_of, seconds_an_access=MEMORY_S / 1200)
    for number in [*range(60), *range(60), *range(1000, 2000)]:
        cache.access(number)
    assert sum(number in cache.held for number in range(60)) == 60


def test_what_is_hit_lately_does_not_hide_what_is_stale_behind_it(chunk_of):
    cache = Cache(100, chunk_of, seconds_an_access=1)
    for _ in range(3):
        for number in range(60):
            cache.access(number)
    for number in range(1000, 1400):
        cache.access(number)
        cache.access(0)  # the first of the main queue
    assert 0 in cache.held
    assert sum(number in cache.held for number in range(1, 60)) == 0


def test_the_ghost_queue_holds_no_more_keys_than_there_are_chunks(chunk_of):
    cache = Cache(30, chunk_of)
    for number in range(500):
        cache.access(number)
        assert cache.queues.num_ghosts <= len(cache.queues)
    assert cache.queues.num_ghosts >= 29


def test_a_candidate_that_must_stay_is_passed_over_in_both_queues(chunk_of):
    queues = S3Fifo(lambda: 0.0)
    for number in range(10):
        queues.add(chunk_of(number))
    free = {7}
    assert queues.victim(lambda chunk: chunk if int.from_bytes(chunk.key, "little") in free else None) is chunk_of(7)
    assert queues.victim(lambda chunk: None) is None
    chunk_of(5).hits = 1
    queues.remove(queues.victim(lambda chunk: chunk if chunk is chunk_of(0) else None), remember=True)
    assert queues.victim(lambda chunk: chunk if chunk is chunk_of(5) else None) is chunk_of(5)


def test_room_is_found_although_everything_was_hit(chunk_of):
    queues = S3Fifo(lambda: 0.0)
    for number in range(3000):
        queues.add(chunk_of(number))
        chunk_of(number).hits = HITS_MAX
    assert queues.victim(lambda chunk: chunk) is not None


def test_hits_are_better_kept_than_by_first_in_first_out(chunk_of):
    """On a Zipf-like stream with scans in it, more accesses hit than with plain FIFO of the same size."""
    seed = random.Random(2)
    stream = []
    for round_number in range(20):
        stream += [int(seed.paretovariate(1.0)) % 400 for _ in range(300)]
        stream += range(10_000 + 100 * round_number, 10_100 + 100 * round_number)
    cache = Cache(50, chunk_of)
    hits = sum(cache.access(number) for number in stream)
    fifo: dict[int, None] = {}
    fifo_hits = 0
    for number in stream:
        fifo_hits += number in fifo
        if number not in fifo:
            fifo[number] = None
            if len(fifo) > 50:
                del fifo[next(iter(fifo))]
    assert hits > fifo_hits * 1.05
