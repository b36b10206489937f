"""The interface of copy engines: between vLLM's paged KV blocks and objects in the canonical layout."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch


class CopyEngine(ABC):
    """Moves one rank's KV between its paged blocks and canonical bytes.

    The rank's shard of a chunk is `[kv_head][layer][token][K row | V row]` over the rank's own heads and layers. One
    engine owns no threads; `gather` is called from the worker's main thread, `scatter` from its load thread.
    """

    @property
    @abstractmethod
    def block_tokens(self) -> int:
        """Tokens a block."""

    @abstractmethod
    def shard_bytes(self, chunk_tokens: int) -> int:
        """Return the size of this rank's shard of one chunk."""

    @abstractmethod
    def gather(self, block_ids: Sequence[int], first_token: int, num_chunks: int, chunk_tokens: int) -> torch.Tensor:
        """Copy consecutive chunks out of paged blocks.

        Args:
            block_ids: consecutive blocks of one request.
            first_token: where the first chunk starts, counted from the start of the first block.
            num_chunks: how many chunks.
            chunk_tokens: tokens a chunk.

        Returns:
            uint8 `[num_chunks, shard_bytes]` in host memory, complete when this returns.
        """

    @abstractmethod
    def scatter(
        self,
        shards: torch.Tensor,
        chunk_tokens: int,
        skip_tokens: int,
        block_ids: Sequence[int],
        first_token: int,
        num_tokens: int,
    ) -> None:
        """Copy tokens of consecutive chunks into paged blocks; visible to the engine when this returns.

        Args:
            shards: uint8 `[num_chunks, shard_bytes]` in host memory.
            chunk_tokens: tokens a chunk.
            skip_tokens: tokens at the start of the first chunk that are not wanted.
            block_ids: consecutive blocks of one request.
            first_token: where the first wanted token goes, counted from the start of the first block.
            num_tokens: how many tokens to write. No other slot is touched.
        """
