"""The interface of copy engines: between vLLM's paged KV blocks and frames of the arena.

One engine serves one rank's paged blocks. The rank's shard of a chunk is `[kv_head][layer][token][K row | V row]` over
the rank's own heads and layers; frames hold objects of whatever shards their producers had. An engine may own device
memory and streams, but no threads other than those that `use_arena` needs: the worker's main thread calls `snapshot`
and `fence`, the one store thread `fill`, each load thread its own `LoadRun`s, all at the same time.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from cachetier.client import ArenaView
from cachetier_blend.rotation import Rotary
from cachetier_connector.plan import ChunkSource, LoadOp


class PoolOffer(NamedTuple):
    """What `OfferPool` says of one rank's part of its engine's pool."""

    object_bytes: int
    num_frames: int
    device: str
    handle: bytes


class Pools(ABC):
    """A worker's pools in device memory: what the store thread has to tell the server of, and hears from it."""

    @abstractmethod
    def offer(self, object_bytes: int) -> PoolOffer | None:
        """Return what this worker offers for objects of a size, None: nothing."""

    @abstractmethod
    def opened(self) -> list[int]:
        """Return the ids of the pools of which parts were opened."""

    @abstractmethod
    def close_gone(self, pools: Iterable[int]) -> None:
        """Close the parts of `pools`, once no load reads them any more."""


class LoadRun(ABC):
    """One load under way: frames are pushed as they become ready. Used by one load thread from open to finish."""

    @property
    @abstractmethod
    def corrupt_key(self) -> bytes | None:
        """The key of the first chunk that did not match its checksum; final after `finish`.

        May be known earlier: whatever is pushed after it is not used, so that the caller can stop.
        """

    @property
    def filled(self) -> list[int]:
        """The frames of the worker's own pool that hold verified bytes of this load; final after `finish`."""
        return []

    @abstractmethod
    def push(self, group: Sequence[ChunkSource]) -> None:
        """Copy the next consecutive chunks of the load; their frames are ready.

        May block, and may return before the chunks are copied or verified. If it raises, nothing more may be pushed,
        and the load has failed as a whole; `finish` must be called all the same.
        """

    @abstractmethod
    def finish(self) -> int:
        """Wait, and return how many chunks, from the first one pushed on, are good.

        Good means verified, written to the load's tokens (and to no other slot), and visible to whatever the engine
        computes from now on. Bytes that do not match are never written to paged blocks that are reported as good.
        After this returns, however it returns, the run touches neither frames nor paged blocks.
        """


class CopyEngine(ABC):
    """Moves one rank's KV between its paged blocks and the arena.

    Attributes:
        rotary: how the model rotates keys, None: not known, and loads that shift chunks fail.
    """

    rotary: Rotary | None = None

    @property
    @abstractmethod
    def block_tokens(self) -> int:
        """Tokens a block."""

    @property
    @abstractmethod
    def keeps_blocks(self) -> bool:
        """Whether a snapshot's KV stays in the paged blocks until `fill` has run, so that these must not be reused.

        False: `snapshot` copies into host memory, which `staging_bytes` bounds, and blocks may be reused at once.
        """

    def use_rotary(self, rotary: Rotary) -> None:
        """Get ready for loads that shift chunks. The worker's main thread, before the first load; may compile."""
        self.rotary = rotary

    @property
    def pools(self) -> Pools | None:
        """The pools in device memory that the engine reads and fills, None: it knows none."""
        return None

    def measure_direct(self, folder: str) -> float:
        """Return how fast the engine reads files in `folder` itself; 0: it is not faster than a promotion and a copy.

        From then on it can load chunks that lie in segment files. Takes seconds; a thread of its own; never raises.
        """
        return 0.0

    @abstractmethod
    def shard_bytes(self, chunk_tokens: int) -> int:
        """Return the size of this rank's shard of one chunk."""

    @abstractmethod
    def use_arena(self, arena: ArenaView) -> None:
        """Learn that `arena` has been mapped, and prepare fast copies to and from it in the background.

        Any thread; never blocks for long; called once for each mapping, before other methods are given it. Copies must
        work before the preparation is done, and if it fails. An engine that holds on to an arena lets go of it when it
        is given the next one (its server has ended), once the copies under way have ended: its memory is shared.
        """

    @abstractmethod
    def snapshot(self, block_ids: Sequence[int], first_token: int, num_chunks: int, chunk_tokens: int) -> Any:
        """Take consecutive chunks as the work launched so far leaves them in the paged blocks.

        The worker's main thread, after the step's work was launched; never waits for a device.

        Args:
            block_ids: consecutive blocks of one request.
            first_token: where the first chunk starts, counted from the start of the first block.
            num_chunks: how many chunks.
            chunk_tokens: tokens a chunk.

        Returns:
            What `fill` needs. It may be dropped without a `fill`.
        """

    @abstractmethod
    def fill(
        self,
        snapshot: Any,
        numbers: Sequence[int],
        arena: ArenaView,
        frames: Sequence[int],
        is_wanted: Callable[[], bool],
    ) -> list[int | None]:
        """Write chunks of a snapshot into frames of the arena: object, page digests, zero padding left as it is.

        The store thread. Blocks until the bytes stand in the arena; after it returns, however it returns, the paged
        blocks are not read any more.

        Args:
            snapshot: from `snapshot`.
            numbers: which of its chunks, ascending.
            arena: to write to, under the caller's lease.
            frames: the offset of the frame of each of `numbers`.
            is_wanted: asked between batches (the first included); False: fill no more, the blocks are needed.

        Returns:
            For each of `numbers` the checksum of its object, None for those that were not filled.
        """

    @abstractmethod
    def fence(self) -> Any:
        """Return what loads that are submitted from now on must wait for before they write to paged blocks.

        The worker's main thread, after it has enqueued work of its own on such blocks; never waits for a device. The
        engine's steps need none: vLLM gives loads only blocks that no step under way touches (`defer_block_free` of its
        scheduler).
        """

    @abstractmethod
    def open_load(self, arena: ArenaView, load: LoadOp, fence: Any) -> LoadRun:
        """Start to carry out `load` from `arena` after `fence`, if there is one.

        A load thread; any number of runs at the same time.
        """

    @abstractmethod
    def read_keys(self, layer: int, block_ids: Sequence[int], num_tokens: int) -> torch.Tensor:
        """Return the K rows of a request's first tokens, `[heads, num_tokens, head_size]`, on the caches' device.

        The worker's main thread; in the order of the engine's stream.
        """

    @abstractmethod
    def stop(self) -> None:
        """Release device memory and let go of arenas. No other method is running or called afterwards."""
