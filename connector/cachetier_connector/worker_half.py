"""The half of the connector that lives in each of vLLM's workers: carries out the scheduler half's plans.

Runs on the worker's main thread between forward passes and does there only what depends on them: gathering chunks out
of blocks. Loading and storing proper happen on the threads of `Loader` and `Storer`.
"""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from cachetier.client import expected_socket
from cachetier.core.keys import TOKEN_BYTES
from cachetier_connector.arena_cache import ArenaCache
from cachetier_connector.copy_factory import make_copy_engine
from cachetier_connector.facts import EngineFacts, layers_in_order, rank_of
from cachetier_connector.link import ServerLink
from cachetier_connector.loader import Loader
from cachetier_connector.plan import StepPlan, StoreOp
from cachetier_connector.storer import Storer

if TYPE_CHECKING:
    from vllm.config import VllmConfig

log = logging.getLogger(__name__)


class WorkerHalf:
    """Does what the plan says."""

    def __init__(self, facts: EngineFacts, vllm_config: "VllmConfig", caches: dict[str, torch.Tensor]) -> None:
        """Start the threads.

        Args:
            facts: of the engine.
            vllm_config: of this worker.
            caches: paged blocks by layer name.

        Raises:
            ConfigError: their layout is not what the model's configuration says.
        """
        ordered = [caches[name] for name in layers_in_order(caches)]
        self._engine = make_copy_engine(ordered, vllm_config)
        number, self._is_storing = rank_of(vllm_config, facts.layout.num_kv_heads)
        shard = facts.tiling[number]
        expected = facts.layout.object_bytes(shard, chunk_tokens=1)
        if self._engine.shard_bytes(chunk_tokens=1) != expected:
            raise ValueError(f"a token has {self._engine.shard_bytes(1)} bytes of KV on this rank, not {expected}")
        self._socket_path = expected_socket(facts.config)
        name = f"worker {vllm_config.parallel_config.rank}"
        arenas = ArenaCache()
        self._storer = Storer(
            ServerLink(name, facts.engine, lambda: self._socket_path),
            facts.tiling,
            number,
            arenas,
            staging_bytes=facts.config.staging_bytes,
        )
        self._loader = Loader(
            self._engine,
            facts.layout,
            shard,
            arenas,
            stall_s=facts.config.load_deadline_ms / 1000,
            report_corrupt=self._storer.report_corrupt,
        )

    def before_forward(self, plan: StepPlan) -> None:
        """Gather from blocks that the coming forward pass may overwrite."""
        self._socket_path = plan.socket_path or self._socket_path
        self._gather(plan.stores_before)

    def start_loads(self, plan: StepPlan) -> None:
        """Start the plan's loads in the background."""
        for load in plan.loads:
            self._loader.submit(load)

    def after_forward(self, plan: StepPlan) -> None:
        """Gather what the forward pass completed."""
        self._gather(plan.stores_after)
        if plan.finished:
            self._storer.finish(plan.finished)

    def take_finished_loads(self) -> set[str]:
        """Return the requests whose loads ended since the last call, successfully or not."""
        return self._loader.take_finished()

    def take_bad_blocks(self) -> set[int]:
        """Return the blocks that loads could not fill, since the last call."""
        return self._loader.take_bad_blocks()

    def stop(self) -> None:
        """Store what is staged and end the threads."""
        self._loader.stop()
        self._storer.stop()

    def _gather(self, stores: Iterable[StoreOp]) -> None:
        if not self._is_storing:
            return
        for store in stores:
            num_chunks = len(store.tokens) // (TOKEN_BYTES * store.chunk_tokens)
            if self._storer.has_room(num_chunks, num_chunks * self._engine.shard_bytes(store.chunk_tokens)):
                first_token = store.position * store.chunk_tokens % self._engine.block_tokens
                shards = self._engine.gather(store.block_ids, first_token, num_chunks, store.chunk_tokens)
                self._storer.submit(store, shards)
