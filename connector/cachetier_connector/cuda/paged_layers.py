"""Where the rows of one rank's paged KV caches lie on the device, as the kernels need to know it.

Made once, when vLLM hands over its caches; read from any thread. It also keeps what Triton compiled for this layout,
so that a launch pays for no look-up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import torch

from cachetier.core.errors import ConfigError
from cachetier_connector.cuda.launch import Launch

ALIGN_BYTES_MAX = 16  # the widest access of a thread


@dataclass(frozen=True, eq=False, slots=True)
class PagedLayers:
    """The layers' caches, all of one shape and with the same strides; a row is K and V of one head, layer and token.

    Attributes:
        caches: the tensors themselves, so that their memory stays.
        layer_ptrs: int64 `[num_layers]` on the device, the address of each layer's first row.
        num_layers: layers of this rank.
        num_heads: KV heads of this rank; 1 for MLA.
        num_blocks: blocks of each layer, as the caches' shape has them.
        block_tokens: tokens a block, as the caches' shape has them (vLLM may split its blocks for its kernels).
        row_bytes: bytes of a row.
        align_bytes: 1 to 16; divides row, strides and addresses.
        unit_bytes: 1 to 8; the integer that rows are moved as. Strides count these.
        block_stride: from a block to the next.
        head_stride: from a head to the next.
        token_stride: from a token to the next.
        launches: compiled kernels by kernel, chunk size and rotation, and how many tiles a chunk has.
    """

    caches: tuple[torch.Tensor, ...]
    layer_ptrs: torch.Tensor
    num_layers: int
    num_heads: int
    num_blocks: int
    block_tokens: int
    row_bytes: int
    align_bytes: int
    unit_bytes: int
    block_stride: int
    head_stride: int
    token_stride: int
    launches: dict[tuple[Any, ...], tuple[Launch, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, caches: Sequence[torch.Tensor]) -> "PagedLayers":
        """Describe `caches`, one tensor a layer: `[blocks, kv heads, block tokens, row]`, or MLA's without heads.

        The last dimension must be contiguous, the others may lie in any order and be shared with other layers.

        Raises:
            ConfigError: the layers differ in shape, strides or device, or have another form.
        """
        first = caches[0]
        for cache in caches:
            if (cache.shape, cache.stride(), cache.dtype, cache.device) != (
                first.shape,
                first.stride(),
                first.dtype,
                first.device,
            ):
                raise ConfigError(
                    f"cachetier serves layers of one shape; this model has KV caches {_form(first)} and {_form(cache)}"
                )
        if first.dim() not in (3, 4) or first.stride(-1) != 1 or 0 in first.shape:
            raise ConfigError(f"cachetier does not know KV caches of the form {_form(first)}")
        size = first.element_size()
        block_stride, *head_stride, token_stride, _ = (stride * size for stride in first.stride())
        row_bytes = first.shape[-1] * size
        strides = (block_stride, head_stride[0] if head_stride else 0, token_stride)
        addresses = [cache.data_ptr() for cache in caches]
        align_bytes = gcd(ALIGN_BYTES_MAX, row_bytes, *strides, *addresses)
        unit_bytes = min(align_bytes, 8)
        return cls(
            caches=tuple(caches),
            layer_ptrs=torch.tensor(addresses, dtype=torch.int64, device=first.device),
            num_layers=len(caches),
            num_heads=first.shape[1] if head_stride else 1,
            num_blocks=first.shape[0],
            block_tokens=first.shape[-2],
            row_bytes=row_bytes,
            align_bytes=align_bytes,
            unit_bytes=unit_bytes,
            block_stride=strides[0] // unit_bytes,
            head_stride=strides[1] // unit_bytes,
            token_stride=strides[2] // unit_bytes,
        )

    def chunk_units(self, chunk_tokens: int) -> int:
        """Return how many units one head and layer of a chunk has."""
        return chunk_tokens * self.row_bytes // self.unit_bytes

    def shard_bytes(self, chunk_tokens: int) -> int:
        """Return the bytes of this rank's shard of a chunk, in the canonical layout."""
        return self.num_heads * self.num_layers * chunk_tokens * self.row_bytes


def _form(cache: torch.Tensor) -> str:
    return f"{tuple(cache.shape)} with strides {cache.stride()}, {cache.dtype}, on {cache.device}"
