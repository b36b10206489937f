"""A connector for tests: cachetier's, which also writes the KV of every request that ends to a file.

The file is what the paged blocks held when the request ended, in the canonical layout: so a test can compare the KV
itself, and not only the tokens that came of it. On a GPU it is read with plain indexing, and not with the copy engine
that the test is about; the CPU's blocks are packed, and only the copy engine knows how.
"""

import os
from pathlib import Path

import numpy as np
import torch

from cachetier_connector.connector import StepMetadata
from cachetier_connector.facts import layers_in_order
from tests.e2e.loading_connector import LoadingConnector

DUMP_DIR = "CACHETIER_TEST_DUMP_DIR"
GRAIN_TOKENS = 16


class ProbeConnector(LoadingConnector):
    """Dumps `[tokens // 16, shard bytes of 16 tokens]` to `DUMP_DIR/REQUEST.RANK.npy`."""

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        self.ended = []

    def request_finished(self, request, block_ids):
        result = super().request_finished(request, block_ids)
        num_grains = (request.num_tokens - 1) // GRAIN_TOKENS
        if num_grains and len(block_ids) * self._facts.block_tokens >= num_grains * GRAIN_TOKENS:
            self.ended.append((request.request_id, list(block_ids), num_grains))
        return result

    def build_connector_meta(self, scheduler_output):
        metadata = super().build_connector_meta(scheduler_output)
        metadata.ended, self.ended = self.ended, []
        return metadata

    def register_kv_caches(self, kv_caches):
        super().register_kv_caches(kv_caches)
        self.caches = [kv_caches[name] for name in layers_in_order(kv_caches)]

    def handle_preemptions(self, kv_connector_metadata):
        super().handle_preemptions(kv_connector_metadata)
        assert isinstance(kv_connector_metadata, StepMetadata)
        for request_id, block_ids, num_grains in getattr(kv_connector_metadata, "ended", ()):
            if self.caches[0].is_cuda:
                shards = read_blocks(self.caches, block_ids, num_grains)
            else:
                shards = self._working._engine.gather(block_ids, 0, num_grains, GRAIN_TOKENS)
            rank = self._vllm_config.parallel_config.rank
            name = request_id.split("-")[0]
            path = Path(os.environ[DUMP_DIR], f"{name}.{rank}.npy")
            np.save(path.with_suffix(".tmp.npy"), shards.numpy())
            path.with_suffix(".tmp.npy").rename(path)


def read_blocks(caches: list[torch.Tensor], block_ids: list[int], num_grains: int) -> torch.Tensor:
    """Return uint8 `[num_grains, heads * layers * 16 * row]` out of layers `[blocks, heads, block tokens, row]`."""
    kv = torch.stack([cache[block_ids].view(torch.uint8) for cache in caches], dim=2)  # [n, heads, layers, tokens, row]
    _, heads, layers, _, row = kv.shape
    kv = kv.permute(0, 3, 1, 2, 4).reshape(-1, heads, layers, row)[: num_grains * GRAIN_TOKENS]
    kv = kv.reshape(num_grains, GRAIN_TOKENS, heads, layers, row).permute(0, 2, 3, 1, 4)
    return kv.reshape(num_grains, -1).cpu()
