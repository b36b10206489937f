"""Which engines read segment files themselves, and the chunks that such an engine was given to read.

An engine reads directly once every one of its workers has said that this is faster on its machine than to have chunks
read into the arena. It does so for chunks that lie on disk alone and that nobody read since they were written or
carried over: the second reading promotes, as it does for everybody, so that what is asked for often comes to lie in
host memory.

Pure bookkeeping; the caller holds the store's lock.
"""

from collections.abc import Callable, Iterable

from cachetier.core.keys import ChainKey
from cachetier.core.messages import ReadsDirectly
from cachetier.storage.disk import DiskChunk, HeldRecord
from cachetier.store.chunk import ChunkState, HostChunk, Tiling


class DirectChunk(HostChunk):
    """A chunk on disk that one lease lets an engine read there: in no table, and its frames are offsets in a file."""

    __slots__ = ("record",)

    def __init__(self, row: DiskChunk, tenant: ChainKey, tiling: Tiling, record: HeldRecord) -> None:
        super().__init__(
            row.key,
            row.parent,
            tenant=tenant,
            namespace=row.namespace,
            position=row.position,
            content=row.content,
            tiling=tiling,
            state=ChunkState.DIRECT,
        )
        self.record = record
        offset = record.offset
        for shard, size in enumerate(tiling.frame_bytes):
            self.frames[shard] = offset
            offset += size
        self.checksums[:] = row.checksums


class DirectReaders:
    """What the workers of each engine have said."""

    def __init__(self) -> None:
        self._said: dict[int, tuple[str, ReadsDirectly]] = {}

    def note(self, engine: str, message: ReadsDirectly) -> None:
        """Note what a worker of `engine` says; a speed of 0 takes it back."""
        self._said[message.session] = engine, message

    def bytes_per_s(self, engine: str) -> float:
        """Return how fast the slowest of the engine's workers reads directly; 0: not all of them do."""
        said = [message for other, message in self._said.values() if other == engine]
        if not said or len(said) < max(message.num_workers for message in said):
            return 0.0
        return min(message.bytes_per_s for message in said)

    def end_session(self, session: int) -> None:
        """Forget what a session that has ended said."""
        self._said.pop(session, None)

    def expire(self, is_open: Callable[[int], bool]) -> None:
        """Forget what sessions said that are not open any more."""
        for session in [session for session in self._said if not is_open(session)]:
            self.end_session(session)


def name_segments(held: Iterable[HostChunk]) -> tuple[list[str], list[int]]:
    """Return the files that direct chunks lie in, and for each chunk the number of its file from 1 on, 0 for none.

    Empty where no chunk is direct.
    """
    numbers: dict[str, int] = {}
    named = [
        numbers.setdefault(chunk.record.path, len(numbers) + 1) if isinstance(chunk, DirectChunk) else 0
        for chunk in held
    ]
    return list(numbers), named if numbers else []
