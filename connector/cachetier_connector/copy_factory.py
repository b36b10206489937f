"""Chooses the copy engine for the device that vLLM's KV caches lie on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from cachetier.core.errors import ConfigError
from cachetier.core.layout import Shard
from cachetier_connector.copy_base import CopyEngine
from cachetier_connector.copy_cpu import CpuCopyEngine, learn_packing
from cachetier_connector.facts import EngineFacts

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def make_copy_engine(
    caches: Sequence[torch.Tensor], vllm_config: "VllmConfig", facts: EngineFacts, shard: Shard, *, has_pool: bool
) -> CopyEngine:
    """Return the copy engine for `caches`, one tensor a layer in the model's order, which hold `shard`.

    `has_pool` says whether it is this rank that keeps its shard's part of the engine's pool.

    Raises:
        ConfigError: there is none for this device or this layout.
    """
    device = caches[0].device.type
    if device == "cuda":
        from cachetier_connector.cuda.copy_cuda import CudaCopyEngine

        config = facts.config
        pool_bytes = config.gpu_bytes if has_pool else 0
        staging_bytes = config.device_staging_bytes
        return CudaCopyEngine(caches, facts.layout, shard, staging_bytes=staging_bytes, pool_bytes=pool_bytes)
    if device != "cpu":
        raise ConfigError(f"cachetier has no copy engine for KV caches on {device!r}; it serves CUDA and CPU engines")
    if any(cache.dim() != 4 or cache.shape != caches[0].shape for cache in caches):
        raise ConfigError(f"cachetier does not know KV caches of shape {tuple(caches[0].shape)}")
    _, _, block_tokens, width = caches[0].shape

    def write_block(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return _write_block(keys, values, caches[0].dtype, str(vllm_config.cache_config.cache_dtype))

    packing = learn_packing(write_block, block_tokens, width // 2, vllm_config.model_config.dtype)
    return CpuCopyEngine(caches, packing, facts.layout, shard)


def _write_block(keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype, kv_cache_dtype: str) -> torch.Tensor:
    """Have vLLM's CPU attention write one block; see `copy_cpu.WriteBlock`."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    block_tokens, _, head_size = keys.shape
    block = torch.zeros(1, 1, block_tokens, 2 * head_size, dtype=dtype)
    key_cache, value_cache = block.view(1, 1, 2 * block_tokens, head_size).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        keys,
        values,
        key_cache,
        value_cache,
        torch.arange(block_tokens),
        _get_attn_isa(keys.dtype, block_tokens, head_size, kv_cache_dtype),
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype=kv_cache_dtype,
    )
    return block
