"""What is answered to engines that tell routers what the tier holds.

Runs on a thread that may read the disk. An engine that begins to follow is told, in parts, what is held at that time,
parents first, and then the changes since. One that has fallen behind the log, or has not asked for a while, begins
anew. The log is kept only while somebody follows.

Of the gpu tier nothing is said: what has a copy there is in host memory too, and routers would take it for one of the
engine's own blocks. Nor of the remote tier, which every node reaches alike, and which evicts without saying so.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain

from cachetier.core.event_messages import Change, FollowChanges, FollowChangesReply
from cachetier.core.keys import TOKEN_BYTES, ChainKey, NamespaceId
from cachetier.core.messages import TIER_DISK, TIER_HOST
from cachetier.storage.disk import DiskChunk
from cachetier.store.books import Books
from cachetier.store.chunk import ChunkState, HostChunk

CHUNKS_PER_REPLY = 256
SILENT_MAX_S = 60.0

log = logging.getLogger(__name__)


class _Follower:
    """How far an engine has been told.

    Attributes:
        held: what is still to be said of what was held when it began.
        number: of the first change in the log that it has not been told.
    """

    __slots__ = ("asked_at", "held", "namespace", "number")

    def __init__(self, namespace: NamespaceId, held: Iterable[ChainKey], number: int) -> None:
        self.namespace = namespace
        self.held = deque(held)
        self.number = number
        self.asked_at = 0.0


class Events:
    """Answers `FollowChanges`. Any thread; one call a session at a time."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._followers: dict[int, _Follower] = {}

    def follow(self, message: FollowChanges) -> FollowChangesReply:
        """See `FollowChanges`; 404 for an unknown session or namespace."""
        books, changes = self._books, self._books.changes
        with books.lock:
            books.leases.session(message.session, books.clock())
            namespace = books.namespaces.get(message.namespace).id
            follower = self._followers.get(message.session)
            if follower is not None and follower.namespace == namespace:
                follower.asked_at = books.clock()
                if not follower.held and (found := changes.since(follower.number, namespace, CHUNKS_PER_REPLY)):
                    told, follower.number = found
                    has_more = follower.number < changes.end
                    return FollowChangesReply(changes=told, starts_anew=False, has_more=has_more)
        starts_anew = follower is None or follower.namespace != namespace or not follower.held
        if follower is None or starts_anew:
            follower = self._begin(message.session, namespace)
        return FollowChangesReply(changes=self._tell_held(follower), starts_anew=starts_anew, has_more=True)

    def end_session(self, session: int) -> None:
        """Forget a session that has ended (lock held)."""
        if self._followers.pop(session, None) is not None and not self._followers:
            self._books.changes.stop()

    def expire(self, now: float, is_open: Callable[[int], bool]) -> None:
        """Forget who does not follow any more (lock held)."""
        for session, follower in list(self._followers.items()):
            if now - follower.asked_at > SILENT_MAX_S or not is_open(session):
                self.end_session(session)

    def _begin(self, session: int, namespace: NamespaceId) -> _Follower:
        books = self._books
        with books.lock:
            books.changes.is_followed = True  # from before the look on: what happens meanwhile is said twice
            number, chunks = books.changes.end, list(books.table.chunks.values())
        follower = _Follower(namespace, self._held(namespace, chunks), number)
        with books.lock:
            follower.asked_at = books.clock()
            books.changes.is_followed = True  # others may have ended meanwhile: then the log has a gap, and it shows
            self._followers[session] = follower
        return follower

    def _held(self, namespace: NamespaceId, chunks: list[HostChunk]) -> list[ChainKey]:
        """Return the chunks that the tiers have of a namespace's texts without a salt, parents before children."""
        found: dict[ChainKey, tuple[int, ChainKey]] = {}
        text_bytes, disk = self._books.chunk_tokens * TOKEN_BYTES, self._books.disk
        everywhere: Iterable[HostChunk | DiskChunk] = chain(chunks, disk.chunks() if disk is not None else ())
        try:
            for chunk in everywhere:
                if chunk.namespace == namespace and len(chunk.content) == text_bytes:
                    found[chunk.key] = chunk.position, chunk.parent
        except OSError as error:
            log.warning("routers do not learn of all that is on disk: the index cannot be read: %s", error)
        known, held = {self._books.hasher.root(namespace, "")}, []
        for key, (_, parent) in sorted(found.items(), key=lambda item: item[1][0]):
            if parent in known:
                known.add(key)
                held.append(key)
        return held

    def _tell_held(self, follower: _Follower) -> list[Change]:
        """Return what a part of the follower's chunks is by now, taking it off the list."""
        books, disk, told = self._books, self._books.disk, list[Change]()
        keys = [follower.held.popleft() for _ in range(min(CHUNKS_PER_REPLY, len(follower.held)))]
        root = books.hasher.root(follower.namespace, "")
        with books.lock:
            found = {key: chunk for key in keys if (chunk := books.table.chunks.get(key)) is not None}
            ready = {key: chunk for key, chunk in found.items() if chunk.state is ChunkState.READY}
        for key in keys:
            row = disk.lookup(key) if disk is not None else None
            for tier, there in ((TIER_HOST, ready.get(key)), (TIER_DISK, row)):
                if there is not None:
                    told.append(Change(key, tier, there.content, b"" if there.parent == root else there.parent))
        return told
