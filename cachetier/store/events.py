"""What is answered to engines that tell routers what the tier holds.

Runs on a thread that may read the disk. An engine that begins to follow is told, in parts, what is held at that time,
parents first, and then the changes since. One that has fallen behind the log, or has not asked for a while, begins
anew. The log is kept only while somebody follows.

Of the gpu tier nothing is said: what has a copy there is in host memory too, and routers would take it for one of the
engine's own blocks. Nor of the remote tier, which every node reaches alike, and which evicts without saying so.
"""

from collections.abc import Callable

from cachetier.core.event_messages import Change, FollowChanges, FollowChangesReply
from cachetier.core.keys import ChainKey, NamespaceId
from cachetier.core.messages import TIER_DISK, TIER_HOST
from cachetier.store.books import Books
from cachetier.store.chunk import ChunkState
from cachetier.store.held_chunks import HeldChunks

CHUNKS_PER_REPLY = 256
SILENT_MAX_S = 60.0
LISTING_S = 0.005  # so long a reply may take for listing: matches want their turn


class _Follower:
    """How far an engine has been told.

    Attributes:
        held: what was held when it began, as far as it has not been told.
        number: of the first change in the log that it has not been told.
    """

    __slots__ = ("asked_at", "held", "namespace", "number")

    def __init__(self, namespace: NamespaceId, held: HeldChunks) -> None:
        self.namespace = namespace
        self.held = held
        self.number = 0
        self.asked_at = 0.0


class Events:
    """Answers `FollowChanges`. Any thread; one call a session at a time."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._followers: dict[int, _Follower] = {}

    def follow(self, message: FollowChanges) -> FollowChangesReply:
        """See `FollowChanges`; 404 for an unknown session or namespace."""
        books, changes, starts_anew = self._books, self._books.changes, False
        with books.lock:
            now = books.clock()
            books.leases.session(message.session, now)
            namespace = books.namespaces.get(message.namespace).id
            follower, found = self._followers.get(message.session), None
            if follower is not None and follower.namespace == namespace:
                found = changes.since(follower.number, namespace, CHUNKS_PER_REPLY)
            if follower is None or found is None:
                changes.is_followed = True
                held = HeldChunks(books, namespace, list(books.table.chunks.values()))
                follower, found = _Follower(namespace, held), ([], changes.end)
                self._followers[message.session], starts_anew = follower, True
            told, follower.number = found
            follower.asked_at, has_more = now, follower.number < changes.end
        if not follower.held.is_done:
            for change in told:  # the engine takes those whose parents it knows; of the others it hears again
                if change.tokens:
                    follower.held.add(change.key, change.parent)
            told += self._describe(follower.held.take(CHUNKS_PER_REPLY, LISTING_S), namespace)
        has_more |= not follower.held.is_done
        return FollowChangesReply(changes=told, starts_anew=starts_anew, has_more=has_more)

    def end_session(self, session: int) -> None:
        """Forget a session that has ended (lock held)."""
        if self._followers.pop(session, None) is not None and not self._followers:
            self._books.changes.stop()

    def expire(self, now: float, is_open: Callable[[int], bool]) -> None:
        """Forget who does not follow any more (lock held)."""
        for session, follower in list(self._followers.items()):
            if now - follower.asked_at > SILENT_MAX_S or not is_open(session):
                self.end_session(session)

    def _describe(self, keys: list[ChainKey], namespace: NamespaceId) -> list[Change]:
        """Return what chunks that were held are by now."""
        books, disk, told = self._books, self._books.disk, list[Change]()
        root = books.hasher.root(namespace, "")
        with books.lock:
            found = {key: chunk for key in keys if (chunk := books.table.chunks.get(key)) is not None}
            ready = {key: chunk for key, chunk in found.items() if chunk.state is ChunkState.READY}
        for key in keys:
            row = disk.lookup(key) if disk is not None else None
            for tier, there in ((TIER_HOST, ready.get(key)), (TIER_DISK, row)):
                if there is not None:
                    told.append(Change(key, tier, there.content, b"" if there.parent == root else there.parent))
        return told
