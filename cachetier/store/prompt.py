"""A prompt while it is matched, or waited for: its chain, and how far it is held.

Plain data. A match that is answered owns it alone; of one that waits, the store's lock guards it.
"""

from cachetier.core.keys import ChainKey
from cachetier.core.messages import TIER_DISK, TIER_HOST, TIER_REMOTE
from cachetier.storage.disk import DiskChunk, HeldRecord
from cachetier.store.chunk import ChunkState, HostChunk
from cachetier.store.namespaces import Namespace


class Prompt:
    """A prompt's chain, how far it is held (pinned), and what a match keeps on disk meanwhile (`kept`).

    `direct_bytes_per_s` is how fast the engine reads segment files itself (0: it does not), and `records` the places
    there that it may be given.
    """

    __slots__ = ("contents", "direct_bytes_per_s", "held", "kept", "keys", "namespace", "records", "root", "tiers")

    def __init__(self, namespace: Namespace, root: ChainKey, contents: list[bytes], keys: list[ChainKey]) -> None:
        self.namespace = namespace
        self.root = root
        self.contents = contents
        self.keys = keys
        self.held: list[HostChunk] = []
        self.tiers = bytearray()
        self.kept: list[ChainKey] = []
        self.direct_bytes_per_s = 0.0
        self.records: dict[ChainKey, HeldRecord] = {}

    def parent_of(self, number: int) -> ChainKey:
        """Return the key before chunk `number`."""
        return self.keys[number - 1] if number else self.root

    def has(self, number: int, chunk: HostChunk | DiskChunk) -> bool:
        """Tell whether `chunk`, found by its key, really is chunk `number` of the prompt."""
        return (
            chunk.content == self.contents[number]
            and chunk.parent == self.parent_of(number)
            and chunk.namespace == self.namespace.id
        )


def tier_of(chunk: HostChunk) -> int:
    """Return where a held chunk lies, as in `MatchReply.tiers`, but for copies in device memory."""
    if chunk.state is ChunkState.READY:
        return TIER_HOST
    return TIER_REMOTE if chunk.is_remote else TIER_DISK
