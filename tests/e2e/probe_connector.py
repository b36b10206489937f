"""A connector for tests: cachetier's, which also writes the KV of every request that ends to a file.

The file is what the paged blocks held when the request ended, in the canonical layout, read with the copy engine: so a
test can compare the KV itself, and not only the tokens that came of it.
"""

import os
from pathlib import Path

import numpy as np

from cachetier_connector.connector import CachetierConnector, StepMetadata

DUMP_DIR = "CACHETIER_TEST_DUMP_DIR"
GRAIN_TOKENS = 16


class ProbeConnector(CachetierConnector):
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

    def handle_preemptions(self, kv_connector_metadata):
        super().handle_preemptions(kv_connector_metadata)
        assert isinstance(kv_connector_metadata, StepMetadata)
        for request_id, block_ids, num_grains in getattr(kv_connector_metadata, "ended", ()):
            shards = self._working._engine.gather(block_ids, 0, num_grains, GRAIN_TOKENS)
            rank = self._vllm_config.parallel_config.rank
            name = request_id.split("-")[0]
            path = Path(os.environ[DUMP_DIR], f"{name}.{rank}.npy")
            np.save(path.with_suffix(".tmp.npy"), shards.numpy())
            path.with_suffix(".tmp.npy").rename(path)
