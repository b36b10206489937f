"""What a match tells of its lease: a pure function of what the lease holds. The caller holds the store's lock."""

from collections.abc import Sequence
from typing import Any

from cachetier.core.messages import MatchReply
from cachetier.core.pool_messages import POOL_NONE
from cachetier.store.chunk import Tiling
from cachetier.store.direct import name_segments
from cachetier.store.leases import Lease
from cachetier.store.prompt import Prompt


def describe(lease: Lease | None, prompt: Prompt, num_pending: int, ready_in_s: Sequence[float]) -> MatchReply:
    """Describe what `lease`, None: no lease, holds of a prompt; `num_pending` and `ready_in_s` as in `MatchReply`."""
    held = prompt.held if lease else []
    tilings: list[Tiling] = []
    tiling_of = bytearray()
    frames: list[Any] = []
    checksums: list[Any] = []
    last: Tiling | None = None
    index = 0
    for chunk in held:
        if chunk.tiling is not last:
            last = chunk.tiling
            if last not in tilings:
                tilings.append(last)
            index = tilings.index(last)
        tiling_of.append(index)
        frames += chunk.frames
        checksums += chunk.checksums
    use = lease.pool_use if lease else None
    segments, segment_of = name_segments(held)
    return MatchReply(
        lease=lease.id if lease else 0,
        num_chunks=len(held),
        keys=b"".join(prompt.keys),
        tiers=bytes(prompt.tiers[: len(held)]),
        tilings=[list(tiling.shards) for tiling in tilings],
        tiling_of=bytes(tiling_of),
        frames=frames,
        checksums=checksums,
        num_pending=num_pending,
        ready_in_s=list(ready_in_s),
        segments=segments,
        segment_of=segment_of,
        pools=[pool.message for pool in use.pools] if use else [],
        # What was waited for came after the pools were chosen.
        pool_of=bytes(use.pool_of).ljust(len(held), bytes([POOL_NONE])) if use else b"",
        pool_frames=use.frames + [0] * (len(held) - len(use.frames)) if use else [],
        fill=use.fill.id if use and use.fill else 0,
    )
