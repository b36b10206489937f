"""What the GPU tier keeps of an engine's pool, of an ordered fill, and of a lease that names copies.

Nearly plain data; `GpuTier` decides, and the store's lock guards it.
"""

from collections import OrderedDict
from collections.abc import Sequence

from cachetier.core.errors import ProtocolError
from cachetier.core.layout import pool_frame_bytes
from cachetier.core.pool_messages import OfferPool, Pool, PoolPart
from cachetier.store.chunk import ChunkState, PoolCopy, Tiling

PARTS_MAX = 4096
FRAMES_MAX = 1 << 31
OBJECT_BYTES_MAX = 1 << 40
DEVICE_LENGTH_MAX = 256
HANDLE_BYTES_MAX = 1024


class EnginePool:
    """One engine's pool.

    Attributes:
        id: unlike that of any other pool of this run of the server.
        engine: whose it is.
        shards, object_bytes: how the chunks that fit are cut.
        sessions: which session offered each part.
        message: how replies describe it.
        num_frames: in every part.
        frame_bytes: of all parts together.
        returned: frames that were in use and are free again.
        num_touched: frames from this one on were never in use.
        ready: copies that can be read, by frame; the next to be looked at for eviction first.
        filling: frames of open fills. The copy of a chunk that is gone meanwhile stays until the fill ends.
        num_users: leases that name it, and open fills.
    """

    __slots__ = (
        "engine", "filling", "frame_bytes", "id", "message", "num_frames", "num_touched", "num_users", "object_bytes",
        "ready", "returned", "sessions", "shards",
    )  # fmt: skip

    def __init__(self, id_: int, engine: str, offers: Sequence[OfferPool]) -> None:
        self.id = id_
        self.engine = engine
        self.shards = tuple(offers[0].tiling)
        self.object_bytes = tuple(offer.object_bytes for offer in offers)
        self.sessions = [offer.session for offer in offers]
        parts = [PoolPart(device=offer.device, handle=offer.handle) for offer in offers]
        self.message = Pool(id=id_, engine=engine, parts=parts)
        self.num_frames = min(offer.num_frames for offer in offers)
        self.frame_bytes = sum(pool_frame_bytes(size) for size in self.object_bytes)
        self.returned: list[int] = []
        self.num_touched = 0
        self.ready: OrderedDict[int, PoolCopy] = OrderedDict()
        self.filling: dict[int, PoolCopy] = {}
        self.num_users = 0

    def fits(self, tiling: Tiling) -> bool:
        """Tell whether chunks that are cut like this have room in its frames."""
        return tiling.shards == self.shards and tiling.object_bytes == self.object_bytes

    def check_integrity(self) -> None:
        """Raise AssertionError unless every frame is free, being filled or held by one copy."""
        frames = [*self.ready, *self.filling, *self.returned, *range(self.num_touched, self.num_frames)]
        assert sorted(frames) == list(range(self.num_frames)), "a frame is lost, or held twice"
        for copies in (self.ready, self.filling):
            for frame, copy in copies.items():
                assert copy.frame == frame, "a copy in another frame"
                assert copy.pool == self.id, "a copy in another pool"
                assert copy.is_ready == (copies is self.ready), "a copy that is ready and being filled"
        for copy in self.ready.values():
            chunk = copy.chunk
            if chunk is not None:
                is_kept = chunk.state is ChunkState.READY or (chunk.state is ChunkState.GONE and chunk.pins > 0)
                assert is_kept, "a copy of a chunk that is not in host memory"


class Fill:
    """Copies that a match ordered.

    Attributes:
        id: what messages name it by.
        pool: where to.
        copies: one a frame.
        good: frames that every rank which committed so far has filled.
        missing: parts whose rank has not committed.
        deadline: when it is given up; None while its lease lives.
    """

    __slots__ = ("copies", "deadline", "good", "id", "missing", "pool")

    def __init__(self, id_: int, pool: EnginePool) -> None:
        self.id = id_
        self.pool = pool
        self.copies: list[PoolCopy] = []
        self.good: set[int] = set()
        self.missing = set(range(len(pool.shards)))
        self.deadline: float | None = None


class PoolUse:
    """What a lease has to do with pools: the fields of its `MatchReply`, the pools it names and the fill it ordered."""

    __slots__ = ("fill", "frames", "pool_of", "pools")

    def __init__(self, num_chunks: int) -> None:
        self.pool_of = bytearray(num_chunks)
        self.frames = [0] * num_chunks
        self.pools: list[EnginePool] = []
        self.fill: Fill | None = None


def check_offer(message: OfferPool) -> None:
    """Check what a session offers.

    Raises:
        ProtocolError: it is impossible.
    """
    numbers = (("num_frames", FRAMES_MAX), ("object_bytes", OBJECT_BYTES_MAX))
    for name, most in numbers:
        if not 1 <= getattr(message, name) <= most:
            raise ProtocolError(f"{name} is {getattr(message, name)}; it must be between 1 and {most}")
    if not 0 <= message.shard < len(message.tiling) <= PARTS_MAX:
        raise ProtocolError(f"shard {message.shard} of a tiling of {len(message.tiling)}; at most {PARTS_MAX}")
    if len(message.device) > DEVICE_LENGTH_MAX or len(message.handle) > HANDLE_BYTES_MAX:
        raise ProtocolError(
            f"a device has {DEVICE_LENGTH_MAX} characters at most, and a handle {HANDLE_BYTES_MAX} bytes"
        )
