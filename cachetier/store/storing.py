"""Reserve and commit: frames for new chunks, and the moment when a chunk becomes visible.

Runs on the caller's thread. Reserve looks up on disk what the host table does not have, without the store's lock, and
then hands out frames under it.

A chunk that is being stored stands in the host table as PENDING. Every rank of the engine reserves, fills and commits
its own object of it; with the last commit the chunk becomes READY and is offered to the flusher. While somebody holds
a lease on one of its objects, its pins count those leases. When one of them ends without a commit (the session died,
the lease expired, the engine gave up) the whole chunk is dropped; its frames are freed when the last rank is done
with its own, so nobody's frame changes hands under a lease. A chunk that nobody is filling and that still lacks an
object (a rank never asked for it) waits for one lease time and is then dropped.

A chunk whose predecessor is held nowhere could never be found, so it is not stored either.
"""

from collections import OrderedDict
from collections.abc import Collection

from cachetier.core.errors import ProtocolError
from cachetier.core.keys import KEY_BYTES, TOKEN_BYTES, ChainKey
from cachetier.core.messages import (
    RESERVE_DROPPED,
    RESERVE_FILL,
    RESERVE_PENDING,
    RESERVE_PRESENT,
    Commit,
    CommitReply,
    Reserve,
    ReserveReply,
)
from cachetier.store.books import Books
from cachetier.store.chunk import ChunkState, HostChunk, Tiling
from cachetier.store.flush import Flusher
from cachetier.store.leases import Lease, Session
from cachetier.store.namespaces import Namespace
from cachetier.store.remote_tier import RemoteTier

POSITION_MAX = 1 << 31
CHECKSUM_MAX = (1 << 64) - 1


class Chain:
    """The chunks of a reserve."""

    __slots__ = ("contents", "keys", "message", "namespace", "parent", "root", "session", "tiling")

    def __init__(self, message: Reserve, session: Session, namespace: Namespace, tiling: Tiling) -> None:
        self.message = message
        self.session = session
        self.namespace = namespace
        self.tiling = tiling
        self.contents: list[bytes] = []
        self.keys: list[ChainKey] = []
        self.root = self.parent = ChainKey(b"")

    def parent_of(self, number: int) -> ChainKey:
        """Return the key before chunk `number`."""
        return self.keys[number - 1] if number else self.parent


class Storer:
    """Answers `reserve` and `commit` and ends leases to fill."""

    def __init__(self, books: Books, flusher: Flusher | None, remote: RemoteTier | None, lease_ttl_s: float) -> None:
        self._books = books
        self._flusher = flusher
        self._remote = remote
        self._lease_ttl_s = lease_ttl_s
        # Pending chunks that nobody is filling, with the time when they are given up: oldest first.
        self._waiting: OrderedDict[HostChunk, float] = OrderedDict()

    def reserve(self, message: Reserve) -> ReserveReply:
        """See `Store.reserve`."""
        chain = self._chain(message)
        on_disk = self._find_on_disk(chain)
        books, shard = self._books, message.shard
        with books.lock:
            session = books.leases.session(message.session, books.clock())
            outcomes, filled = bytearray(), []
            is_parent_held = self._is_held(chain, message.fill_from - 1, on_disk)
            for number in range(message.fill_from, len(chain.keys)):
                outcome = RESERVE_DROPPED
                if is_parent_held and not books.leases.is_full:
                    outcome = self._reserve_one(chain, number, shard, on_disk)
                is_parent_held = outcome != RESERVE_DROPPED
                outcomes.append(outcome)
                if outcome == RESERVE_DROPPED:
                    books.promises.settle(chain.keys[number])
                if outcome == RESERVE_FILL:
                    filled.append(books.table.chunks[chain.keys[number]])
            books.counters.stores_dropped += outcomes.count(RESERVE_DROPPED)
            lease = books.leases.grant(session, filled, books.clock(), shard=shard) if filled else None
        return ReserveReply(
            lease=lease.id if lease else 0,
            keys=b"".join(chain.keys),
            outcomes=bytes(outcomes),
            frames=[offset for chunk in filled if (offset := chunk.frames[shard]) is not None],
        )

    def commit(self, message: Commit) -> CommitReply:
        """See `Store.commit`."""
        books = self._books
        if any(value is not None and not 0 <= value <= CHECKSUM_MAX for value in message.checksums):
            raise ProtocolError("a checksum is no unsigned 64-bit number")
        with books.lock:
            now = books.clock()
            session = books.leases.session(message.session, now)
            lease = books.leases.get(session, message.lease)
            if lease is None:
                return CommitReply(accepted=0)
            if lease.shard is None:
                raise ProtocolError(f"lease {lease.id} is one to read", status=409)
            if len(message.checksums) != len(lease.chunks):
                raise ProtocolError(f"{len(message.checksums)} checksums for {len(lease.chunks)} frames")
            books.leases.end(lease)
            accepted = 0
            for chunk, checksum in zip(lease.chunks, message.checksums, strict=True):
                accepted += self._commit_one(chunk, lease.shard, checksum, now)
        return CommitReply(accepted=accepted)

    def release_fill(self, lease: Lease) -> None:
        """Drop what an ended lease to fill did not commit (lock held)."""
        for chunk in lease.chunks:
            self._drop(chunk)
            self._books.table.unpin(chunk)

    def expire(self, now: float) -> None:
        """Drop pending chunks that lack an object which nobody is filling (lock held)."""
        while self._waiting:
            chunk, deadline = next(iter(self._waiting.items()))
            if deadline > now:
                break
            self._drop(chunk)

    def check_integrity(self) -> None:
        """Raise AssertionError if a pending chunk is neither being filled nor waiting (lock held)."""
        for chunk in self._books.table.chunks.values():
            if chunk.state is ChunkState.PENDING:
                assert (chunk.pins == 0) == (chunk in self._waiting), "a pending chunk that nobody will end"
        assert all(chunk.state is ChunkState.PENDING for chunk in self._waiting), "a waiting chunk is not pending"

    def _chain(self, message: Reserve) -> Chain:
        """Check the message and compute its keys.

        Raises:
            ProtocolError: see `Store.reserve`.
        """
        books = self._books
        contents = books.contents(message.tokens, message.extras, message.salt)
        with books.lock:
            session = books.leases.session(message.session, books.clock())
            namespace = books.namespaces.get(message.namespace)
            chain = Chain(message, session, namespace, namespace.tiling(message.tiling))
        chain.contents = contents
        self._check(message, len(contents), namespace)
        chain.root = books.hasher.root(namespace.id, message.salt)
        chain.parent = ChainKey(message.parent) if message.parent else chain.root
        chain.keys = books.hasher.chain(chain.parent, contents)
        return chain

    def _check(self, message: Reserve, num_chunks: int, namespace: Namespace) -> None:
        step = self._books.chunk_tokens * TOKEN_BYTES
        if len(message.tokens) % step:
            raise ProtocolError(f"tokens are {len(message.tokens)} bytes, no whole chunks of {step}")
        if not 0 <= message.shard < len(message.tiling):
            raise ProtocolError(f"shard {message.shard} of a tiling of {len(message.tiling)}")
        if not 0 <= message.fill_from <= num_chunks:
            raise ProtocolError(f"fill_from is {message.fill_from}; the message has {num_chunks} chunks")
        if not 0 <= message.position <= POSITION_MAX - num_chunks:
            raise ProtocolError(f"position is {message.position}; it must be between 0 and {POSITION_MAX}")
        if len(message.parent) not in (0, KEY_BYTES) or bool(message.parent) != bool(message.position):
            raise ProtocolError(f"a parent has {KEY_BYTES} bytes, and only a chain's first chunk has none")
        if message.group != namespace.layout.group:
            raise ProtocolError(f"group {message.group} is not the namespace's {namespace.layout.group}")

    def _find_on_disk(self, chain: Chain) -> Collection[int]:
        """Return the numbers of the chunks, from the one before `fill_from` on, that are on disk (lock not held).

        Number -1 is the message's parent. Ends with the first chunk to fill that is held nowhere: what follows such a
        chunk is rarely there, a look-up costs more than all the rest, and the disk tier does not write a chunk twice.
        """
        disk, flusher = self._books.disk, self._flusher
        if disk is None or flusher is None:
            return ()
        chunks, found = self._books.table.chunks, set()
        for number in range(chain.message.fill_from - 1, len(chain.keys)):
            key = chain.parent_of(number + 1)
            if key in chunks or key == chain.root or flusher.is_forgotten(key):
                continue
            row = disk.lookup(key)
            if row is not None and row.namespace == chain.namespace.id:
                found.add(number)
            elif number >= chain.message.fill_from:
                break
        return found

    def _is_held(self, chain: Chain, number: int, on_disk: Collection[int]) -> bool:
        """Tell whether chunk `number` (-1: the message's parent) is the root, held or being stored."""
        key = chain.parent_of(number + 1)
        chunk = self._books.table.chunks.get(key)
        if chunk is not None:
            return chunk.tenant == chain.root and chunk.position == chain.message.position + number
        return key == chain.root or number in on_disk

    def _reserve_one(self, chain: Chain, number: int, shard: int, on_disk: Collection[int]) -> int:
        table = self._books.table
        key, parent = chain.keys[number], chain.parent_of(number)
        chunk = table.chunks.get(key)
        if chunk is not None:
            if chunk.content != chain.contents[number] or chunk.parent != parent:
                return RESERVE_DROPPED
            return self._join(chain, chunk, shard) if chunk.state is ChunkState.PENDING else RESERVE_PRESENT
        if number in on_disk:
            return RESERVE_PRESENT
        chunk = HostChunk(
            key,
            parent,
            tenant=chain.root,
            namespace=chain.namespace.id,
            position=chain.message.position + number,
            content=chain.contents[number],
            tiling=chain.tiling,
            state=ChunkState.PENDING,
            engine=chain.session.engine,
        )
        chunk.pins = 1
        table.add(chunk)
        if table.allocate(chunk, shard):
            return RESERVE_FILL
        table.remove(chunk)
        table.unpin(chunk)
        return RESERVE_DROPPED

    def _join(self, chain: Chain, chunk: HostChunk, shard: int) -> int:
        """Let another rank of the engine that is storing `chunk` fill its own object."""
        if chunk.engine != chain.session.engine or chunk.tiling is not chain.tiling or chunk.frames[shard] is not None:
            return RESERVE_PENDING
        chunk.pins += 1
        self._waiting.pop(chunk, None)
        if self._books.table.allocate(chunk, shard):
            return RESERVE_FILL
        self._books.table.remove(chunk)
        self._books.table.unpin(chunk)
        return RESERVE_DROPPED

    def _commit_one(self, chunk: HostChunk, shard: int, checksum: int | None, now: float) -> bool:
        books = self._books
        is_accepted = checksum is not None and chunk.state is ChunkState.PENDING
        if not is_accepted:
            self._drop(chunk)
        else:
            chunk.checksums[shard] = checksum
            if None not in chunk.checksums:
                books.table.seal(chunk, is_durable=False)
                books.tokens.stored += books.chunk_tokens
                books.promises.settle(chunk.key)
                if self._flusher is not None:
                    self._flusher.offer(chunk)
                if self._remote is not None:
                    self._remote.putter.offer(chunk)
            elif chunk.pins == 1:
                self._waiting[chunk] = now + self._lease_ttl_s
        books.table.unpin(chunk)
        return is_accepted

    def _drop(self, chunk: HostChunk) -> None:
        if chunk.state is ChunkState.PENDING:
            self._waiting.pop(chunk, None)
            self._books.table.remove(chunk)
            self._books.promises.settle(chunk.key)
            self._books.counters.stores_dropped += 1
