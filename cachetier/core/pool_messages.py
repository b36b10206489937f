"""The messages about pools in device memory: see `cachetier.core.messages` for all others, and for the rules.

A worker offers device memory, the server says in a match what to read there and what to copy there, the workers commit
the copies, and ask now and then which of the other engines' pools are gone.
"""

from cachetier.core.layout import Shard
from cachetier.core.message_base import Message

# What `MatchReply.pool_of` says of a chunk besides the number of a pool, from 1 on.
POOL_NONE = 0
POOL_FILL = 255
POOLS_NAMED_MAX = 254


class PoolPart(Message, frozen=True):
    """One rank's part of an engine's pool.

    Attributes:
        device: UUID of the device whose memory it is.
        handle: CUDA IPC handle of that memory; frame `k` starts `k * pool_frame_bytes(size of its object)` in.
    """

    device: str
    handle: bytes


class Pool(Message, frozen=True):
    """An engine's pool in device memory.

    Attributes:
        id: unlike that of any other pool; one that was offered again has another.
        engine: whose it is.
        parts: one for each shard of the tilings of the chunks in it.
    """

    id: int
    engine: str
    parts: list[PoolPart]


class OfferPool(Message, frozen=True):
    """Offer device memory of one rank as its part of its engine's pool, for as long as the session lives.

    The pool is in use once sessions of the engine have offered a part for each shard of the tiling.

    Attributes:
        tiling: how the engine cuts chunks into objects.
        shard: which of them this part holds.
        object_bytes: size of one such object.
        num_frames: how many of them there is room for.
        device, handle: see `PoolPart`.
    """

    session: int
    tiling: list[Shard]
    shard: int
    object_bytes: int
    num_frames: int
    device: str
    handle: bytes


class CommitPool(Message, frozen=True):
    """Say which frames of a fill this rank has filled with verified bytes; the others' copies are dropped.

    A copy can be read when all ranks have committed it.

    Attributes:
        fill: as in `MatchReply.fill`; one that has ended is ignored.
        frames: frame numbers.
    """

    session: int
    fill: int
    frames: list[int]


class CheckPools(Message, frozen=True):
    """Ask which of the pools that this process has opened are gone."""

    session: int
    pools: list[int]


class CheckPoolsReply(Message, frozen=True):
    """The pools that no longer stand, and whose memory is to be let go of."""

    gone: list[int]
