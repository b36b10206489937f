"""The half of the connector that lives in each of vLLM's workers: carries out the scheduler half's plans.

Runs on the worker's main thread between forward passes and does there only what depends on them: taking snapshots of
chunks. Loading and storing proper happen on the threads of `Loader` and `Storer`.
"""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from cachetier.client import expected_socket
from cachetier_connector.arena_cache import ArenaCache
from cachetier_connector.blender import Blender
from cachetier_connector.copy_factory import make_copy_engine
from cachetier_connector.facts import EngineFacts, layers_in_order, rank_of
from cachetier_connector.link import ServerLink
from cachetier_connector.loader import Loader
from cachetier_connector.plan import StepPlan, StoreOp, Verdict
from cachetier_connector.storer import Storer

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# vLLM's loop would sleep for 1 ms and run an empty step, with the interpreter's lock that the load threads need.
IDLE_WAIT_S = 0.002

log = logging.getLogger(__name__)


class WorkerHalf:
    """Does what the plan says."""

    def __init__(
        self, facts: EngineFacts, vllm_config: "VllmConfig", caches: dict[str, torch.Tensor], spec: Any
    ) -> None:
        """Start the threads.

        Args:
            facts: of the engine.
            vllm_config: of this worker.
            caches: paged blocks by layer name.
            spec: vLLM's specification of their KV cache group.

        Raises:
            ConfigError: their layout is not what the model's configuration says.
        """
        layers = layers_in_order(caches)
        ordered = [caches[name] for name in layers]
        number, self._is_storing = rank_of(vllm_config, facts.layout.num_kv_heads)
        shard = facts.tiling[number]
        self._engine = make_copy_engine(ordered, vllm_config, facts, shard, has_pool=self._is_storing)
        assert self._engine.keeps_blocks == facts.keeps_blocks, "the scheduler half would let blocks go too early"
        expected = facts.layout.object_bytes(shard, chunk_tokens=1)
        if self._engine.shard_bytes(chunk_tokens=1) != expected:
            raise ValueError(f"a token has {self._engine.shard_bytes(1)} bytes of KV on this rank, not {expected}")
        self._socket_path = expected_socket(facts.config)
        self._is_idle = False
        parallel = vllm_config.parallel_config
        name = f"worker {parallel.rank}"
        arenas = ArenaCache(self._engine.use_arena)
        self._storer = Storer(
            self._engine,
            ServerLink(name, facts.engine, lambda: self._socket_path),
            facts.tiling,
            number,
            arenas,
            staging_bytes=facts.config.staging_bytes,
            deadline_s=facts.config.store_deadline_ms / 1000,
            num_workers=facts.num_workers,
        )
        self._loader = Loader(
            self._engine,
            arenas,
            stall_s=facts.config.load_deadline_ms / 1000,
            report_corrupt=self._storer.report_corrupt,
            report_filled=self._storer.commit_pool,
        )
        self._fence: Any = None  # after the latest pass of the blender's
        self._blender: Blender | None = None
        if facts.config.blend != "off" and not facts.blend_refusal:
            self._blender = Blender(facts, vllm_config, spec, layers, self._engine)
        self._refusal_to_tell = self._blender.refusal if self._blender else ""

    def before_forward(self, plan: StepPlan) -> None:
        """Take from blocks that the coming forward pass may overwrite, and see that nobody reads those of others."""
        self._socket_path = plan.socket_path or self._socket_path
        self._storer.is_serving = True
        self._is_idle = not plan.step
        self._store(plan.stores_before)
        if plan.preempted:  # after the stores: they may be of requests that were preempted before they ended
            self._storer.cancel(plan.preempted)
        if plan.finished:  # not after the forward pass: a step without one does not call `after_forward` on vLLM 0.26
            self._storer.finish(plan.finished, plan.held)

    def start_loads(self, plan: StepPlan) -> None:
        """Start the plan's loads in the background, and compute what it blends or checks."""
        for load in plan.loads:
            self._loader.submit(load, self._fence)
        if plan.blends:
            assert self._blender is not None, "the scheduler half knows what workers refuse"
            self._blender.carry_out(plan.blends)
        if plan.check is not None:
            assert self._blender is not None, "what was blended was blended by it"
            self._blender.check(plan.check)
        if plan.blends or plan.check is not None:
            self._fence = self._engine.fence()

    def after_forward(self, plan: StepPlan) -> None:
        """Take what the forward pass completed."""
        self._store(plan.stores_after)

    def take_released(self) -> set[str]:
        """Return the plans' held requests whose blocks are not read any more, since the last call."""
        return self._storer.take_released()

    def take_finished_loads(self) -> set[str]:
        """Return the requests whose loads ended since the last call, successfully or not, and blends with them.

        In a step without a forward pass, wait a moment for one: nothing else can make the engine go on.
        """
        blended = self._blender.take_finished() if self._blender else set[str]()
        return blended | self._loader.take_finished(IDLE_WAIT_S if self._is_idle and not blended else 0.0)

    def take_parts(self) -> dict[str, dict[int, list[int]]]:
        """Return up to which token this rank loaded the parts of blended requests that ended since the last call."""
        return {name: {part: [end] for part, end in ends.items()} for name, ends in self._loader.take_parts().items()}

    def take_computed(self) -> dict[str, int]:
        """Return how many tokens blend passes computed since the last call, by request."""
        return self._blender.take_computed() if self._blender else {}

    def take_verdict(self) -> Verdict | None:
        """Return what a check has found since the last call, on the ranks that are given the model's answers."""
        return self._blender.take_verdict() if self._blender else None

    def take_refusal(self) -> str:
        """Return, once, why this worker blends nothing; empty: it does, or said so before."""
        refusal, self._refusal_to_tell = self._refusal_to_tell, ""
        return refusal

    def take_load_seconds(self) -> dict[str, float]:
        """Return how long the loads took that ended since the last call, by request."""
        return self._loader.take_seconds()

    def take_bad_blocks(self) -> set[int]:
        """Return the blocks that loads could not fill, since the last call."""
        return self._loader.take_bad_blocks() | (self._blender.take_bad_blocks() if self._blender else set())

    def stop(self) -> None:
        """Store what is queued and end the threads."""
        have_ended = [self._loader.stop(), self._storer.stop()]
        if all(have_ended):
            self._engine.stop()

    def _store(self, stores: Iterable[StoreOp]) -> None:
        if self._is_storing:
            for store in stores:
                self._storer.submit(store)
