"""The latest changes of what the tiers hold, for engines that tell routers of them.

Pure bookkeeping; the caller holds the store's lock. While nobody follows, noting a change costs one comparison. Chunks
under a salt are never noted as stored, nor are those with images or sounds, which tokens alone do not describe.
"""

from collections import deque
from collections.abc import Callable
from itertools import islice

from cachetier.core.event_messages import Change
from cachetier.core.keys import TOKEN_BYTES, ChainKey, NamespaceId
from cachetier.store.chunk import HostChunk

CHANGES_MAX = 1 << 16


class ChangeLog:
    """A bounded list of numbered changes: the oldest ones go.

    Attributes:
        is_followed: whether somebody wants to know; else nothing is noted.
        end: number of the next change.
    """

    def __init__(self, root_of: Callable[[NamespaceId], ChainKey], chunk_tokens: int) -> None:
        """Make an empty log; `root_of` returns the root of a namespace's chains without a salt."""
        self._root_of, self._content_bytes = root_of, chunk_tokens * TOKEN_BYTES
        self._entries: deque[tuple[NamespaceId | None, Change]] = deque(maxlen=CHANGES_MAX)
        self.is_followed = False
        self.end = 0

    def note_stored(self, chunk: HostChunk, tier: int) -> None:
        """Note that `tier` has a chunk now."""
        if not self.is_followed or len(chunk.content) != self._content_bytes:
            return
        root = self._root_of(chunk.namespace)
        if chunk.tenant == root:
            parent = b"" if chunk.parent == root else chunk.parent
            self._note(chunk.namespace, Change(chunk.key, tier, chunk.content, parent))

    def note_gone(self, key: ChainKey, tier: int) -> None:
        """Note that `tier` does not have a chunk any more."""
        if self.is_followed:
            self._note(None, Change(key, tier))

    def since(self, number: int, namespace: NamespaceId, most: int) -> tuple[list[Change], int] | None:
        """Return `most` changes from `number` on, without other namespaces', and the number after them.

        None: some of them have gone.
        """
        start = number - (self.end - len(self._entries))
        if start < 0:
            return None
        taken = list(islice(self._entries, start, start + most))
        return [change for owner, change in taken if owner in (None, namespace)], number + len(taken)

    def stop(self) -> None:
        """Forget everything: nobody follows."""
        self.is_followed = False
        self._entries.clear()

    def _note(self, namespace: NamespaceId | None, change: Change) -> None:
        self._entries.append((namespace, change))
        self.end += 1
