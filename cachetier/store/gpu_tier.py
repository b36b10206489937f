"""The GPU tier's books: which chunks have a copy in which engine's pool, and which copies are being made.

Pure bookkeeping; the caller holds the store's lock. The device memory belongs to the engines' workers: each rank offers
its part of its engine's pool, and the pool is in use once all parts are there. Frame number k of a pool is frame k in
every part, and holds the objects of one chunk, one a part; only chunks that were cut as the engine cuts them fit.

A copy is never all there is: its chunk is READY in the host table as well, and the copy goes with the host chunk. So
the lease that pins the chunk keeps the copy too, and when the pool's owner dies the books forget the pool at once
while everything goes on from host memory.

Which chunks: those that somebody asks for again. A match that finds a chunk in host memory is at least the second to
ask for it (the first led to its being stored), so a prompt that is sent once never gets here. Room is made by second
chance: each match adds a hit to a copy, up to HITS_MAX, and whoever looks for a frame looks at LOOKS_PER_FRAME copies,
oldest first, takes a hit from each and evicts the first that has none. If all have hits, the copy is not made: of a
working set larger than the pool a part stays, where evicting for every new chunk would keep nothing.

Order of a fill: the match that finds a chunk hot gives it a frame and lists it in a `Fill`; every rank copies its
object there while it loads, and commits; with the last commit the copies can be read. A fill stays open while its
lease lives and one lease time longer (the commits may arrive after the release), unless the lease is released without
having been used. Its frames are nobody else's for so long, and no copy in use is evicted (its chunk is pinned).
A dissolved pool's memory may still stand, if only the connection to its owner was lost. Therefore an engine's next
pool waits until no lease names the former one and no fill of it is open.
"""

import secrets
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence

from cachetier.core.messages import TIER_GPU
from cachetier.core.pool_messages import POOL_FILL, POOLS_NAMED_MAX, OfferPool
from cachetier.store.chunk import HITS_MAX, ChunkState, HostChunk, PoolCopy, Tiling
from cachetier.store.pools import EnginePool, Fill, PoolUse, check_offer

LOOKS_PER_FRAME = 2


class GpuTier:
    """All pools. Conservation: every frame of a pool is free, being filled or held by one copy."""

    def __init__(self, lease_ttl_s: float) -> None:
        self.num_filled = 0
        self.num_evicted = 0
        self._lease_ttl_s = lease_ttl_s
        self._offers: dict[int, tuple[str, OfferPool]] = {}
        self._pools: dict[int, EnginePool] = {}
        self._of_engine: dict[str, EnginePool] = {}
        self._dissolved: dict[str, EnginePool] = {}
        self._fills: dict[int, Fill] = {}
        self._ending: OrderedDict[int, Fill] = OrderedDict()  # fills whose lease has ended, first deadline first
        self._last_id = secrets.randbits(52)

    @property
    def used_bytes(self) -> int:
        """Device memory that holds copies."""
        return sum(len(pool.ready) * pool.frame_bytes for pool in self._pools.values())

    @property
    def limit_bytes(self) -> int:
        """Device memory of all pools."""
        return sum(pool.num_frames * pool.frame_bytes for pool in self._pools.values())

    @property
    def num_copies(self) -> int:
        """Copies that can be read."""
        return sum(len(pool.ready) for pool in self._pools.values())

    # Pools.

    def offer(self, engine: str, message: OfferPool) -> None:
        """Take a rank's part of its engine's pool; what its session, or another for this part, offered is replaced.

        Raises:
            ProtocolError: the message is impossible.
        """
        check_offer(message)
        known = self._offers.get(message.session)
        if known == (engine, message):
            return
        for session, (other, offer) in list(self._offers.items()):
            if session == message.session or (other == engine and offer.shard == message.shard):
                self.end_session(session)
        self._offers[message.session] = engine, message
        self._form(engine)

    def end_session(self, session: int) -> None:
        """Forget what a session that has ended offered: the pool it was a part of is dissolved."""
        engine, _ = self._offers.pop(session, ("", None))
        pool = self._of_engine.get(engine)
        if pool is None or session not in pool.sessions:
            return
        del self._of_engine[engine], self._pools[pool.id]
        for copy in [*pool.ready.values(), *pool.filling.values()]:
            _part(copy)
        if pool.num_users:
            self._dissolved[engine] = pool

    def gone(self, pools: Iterable[int]) -> list[int]:
        """Return those of `pools` that do not stand any more."""
        return [pool for pool in pools if pool not in self._pools]

    # What happens to a chunk.

    def use(self, engine: str, held: Sequence[HostChunk], tiers: bytearray) -> PoolUse | None:
        """Name the copies of pinned chunks for a match of `engine`, noting them in `tiers`, and order what is missing.

        Returns:
            None if there is nothing to say. Otherwise the match's lease keeps it and hands it to `end_use`.
        """
        if not self._pools:
            return None
        use, own, numbers = PoolUse(len(held)), self._of_engine.get(engine), dict[int, int]()
        fitting: Tiling | None = None
        for number, chunk in enumerate(held):
            copy = chunk.copy
            if copy is None and own is not None and chunk.state is ChunkState.READY:
                if chunk.tiling is not fitting:
                    if not own.fits(chunk.tiling):
                        continue
                    fitting = chunk.tiling
                self._order(use, own, number, chunk)
            elif copy is not None and copy.is_ready:
                if copy.pool not in numbers:
                    if len(numbers) == POOLS_NAMED_MAX:
                        continue
                    use.pools.append(self._pools[copy.pool])
                    numbers[copy.pool] = len(numbers) + 1
                copy.hits = min(copy.hits + 1, HITS_MAX)
                tiers[number] = TIER_GPU
                use.pool_of[number], use.frames[number] = numbers[copy.pool], copy.frame
        if use.fill is None and not use.pools:
            return None
        for pool in use.pools:
            pool.num_users += 1
        return use

    def end_use(self, use: PoolUse, now: float, *, may_fill: bool) -> None:
        """Note that a lease has ended; unless its fill `may_fill` still (a rank may be at it), give that up."""
        for pool in use.pools:
            self._leave(pool)
        fill = use.fill
        if fill is None or fill.id not in self._fills:
            return
        if not may_fill:
            fill.good.clear()
            self._end(fill)
        else:
            fill.deadline = now + self._lease_ttl_s
            self._ending[fill.id] = fill

    def commit(self, session: int, fill_id: int, frames: Collection[int]) -> None:
        """Note which frames of a fill a rank has filled; with the last rank's word the copies can be read.

        A fill that has ended, or a session without a part in it, is ignored: what it filled is not used.
        """
        fill = self._fills.get(fill_id)
        if fill is None or session not in fill.pool.sessions:
            return
        fill.good.intersection_update(frames)
        fill.missing.discard(fill.pool.sessions.index(session))
        if not fill.missing:
            self._end(fill)

    def forget(self, chunk: HostChunk) -> None:
        """Drop the copy of a chunk that leaves host memory, and that nobody has leased."""
        copy = chunk.copy
        if copy is None:
            return
        assert not chunk.pins, "a copy in use is dropped"
        _part(copy)
        if copy.is_ready:
            pool = self._pools[copy.pool]
            del pool.ready[copy.frame]
            pool.returned.append(copy.frame)

    def expire(self, now: float, is_open: Callable[[int], bool]) -> None:
        """Give up fills whose time is over and forget what sessions offered that are not open any more."""
        while self._ending and (fill := next(iter(self._ending.values()))).deadline is not None:
            if fill.deadline > now:
                break
            fill.good.clear()
            self._end(fill)
        for session in [session for session in self._offers if not is_open(session)]:
            self.end_session(session)

    def check_integrity(self, chunks: Iterable[HostChunk], uses: Iterable[PoolUse]) -> None:
        """Raise AssertionError if pools, fills, the copies that `chunks` know of and the leases' `uses` disagree."""
        standing = [*self._pools.values(), *self._dissolved.values()]
        users = {pool.id: 0 for pool in standing}
        for pool in [pool for use in uses for pool in use.pools] + [fill.pool for fill in self._fills.values()]:
            users[pool.id] += 1
        for pool in standing:
            assert pool.num_users == users[pool.id], "a pool's leases and fills are not counted right"
            pool.check_integrity()
        filling = {id(copy) for fill in self._fills.values() for copy in fill.copies}
        assert filling == {id(c) for pool in standing for c in pool.filling.values()}, "a frame of no fill, or two"
        live = [copy for pool in self._pools.values() for copy in [*pool.ready.values(), *pool.filling.values()]]
        known = {id(chunk.copy): chunk for chunk in chunks if chunk.copy is not None}
        assert known == {id(copy): copy.chunk for copy in live if copy.chunk is not None}, "a copy without its chunk"
        assert all(pool.num_users for pool in self._dissolved.values()), "a dissolved pool that nobody uses is kept"
        assert not self._of_engine.keys() & self._dissolved.keys(), "a pool is used while leases name its former one"
        assert {id(pool) for pool in self._of_engine.values()} == {id(pool) for pool in self._pools.values()}

    # Internals.

    def _form(self, engine: str) -> None:
        """Put an engine's pool to use if all its parts have been offered and its former one is out of use."""
        if engine in self._of_engine or engine in self._dissolved:
            return
        offers = [offer for other, offer in self._offers.values() if other == engine]
        if not offers:
            return
        tiling = offers[-1].tiling
        by_shard = {offer.shard: offer for offer in offers if offer.tiling == tiling}
        if len(by_shard) < len(tiling):
            return
        pool = EnginePool(self._next_id(), engine, [by_shard[shard] for shard in range(len(tiling))])
        self._pools[pool.id] = self._of_engine[engine] = pool

    def _order(self, use: PoolUse, pool: EnginePool, number: int, chunk: HostChunk) -> None:
        """Add chunk `number` of a match to the fill that the match orders, if a frame can be had for it."""
        frame = self._take_frame(pool)
        if frame is None:
            return
        fill = use.fill
        if fill is None:
            fill = use.fill = Fill(self._next_id(), pool)
            self._fills[fill.id] = fill
            pool.num_users += 1
        copy = PoolCopy(chunk, pool.id, frame)
        pool.filling[frame] = chunk.copy = copy
        fill.copies.append(copy)
        fill.good.add(frame)
        use.pool_of[number], use.frames[number] = POOL_FILL, frame

    def _take_frame(self, pool: EnginePool) -> int | None:
        """Return a frame of nobody, evicting a copy that nobody uses or asked for lately; None: there is none."""
        if pool.returned:
            return pool.returned.pop()
        if pool.num_touched < pool.num_frames:
            pool.num_touched += 1
            return pool.num_touched - 1
        for _ in range(min(LOOKS_PER_FRAME, len(pool.ready))):
            frame, copy = next(iter(pool.ready.items()))
            chunk = copy.chunk
            assert chunk is not None
            if not copy.hits and not chunk.pins:
                del pool.ready[frame]
                _part(copy)
                self.num_evicted += 1
                return frame
            copy.hits = max(copy.hits - 1, 0)
            pool.ready.move_to_end(frame)
        return None

    def _end(self, fill: Fill) -> None:
        """End a fill: its good copies can be read, the frames of the others are free."""
        del self._fills[fill.id]
        self._ending.pop(fill.id, None)
        pool = fill.pool
        for copy in fill.copies:
            del pool.filling[copy.frame]
            chunk = copy.chunk
            if chunk is not None and copy.frame in fill.good and chunk.state is ChunkState.READY:
                copy.is_ready = True
                pool.ready[copy.frame] = copy
                self.num_filled += 1
                continue
            pool.returned.append(copy.frame)
            _part(copy)
        self._leave(pool)

    def _leave(self, pool: EnginePool) -> None:
        pool.num_users -= 1
        if not pool.num_users and self._dissolved.get(pool.engine) is pool:
            del self._dissolved[pool.engine]
            self._form(pool.engine)

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id


def _part(copy: PoolCopy) -> None:
    """Let chunk and copy forget each other."""
    if copy.chunk is not None:
        copy.chunk.copy = None
        copy.chunk = None
