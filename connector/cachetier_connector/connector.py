"""`CachetierConnector`: what vLLM makes once in the scheduler and once in every worker; two halves do the work."""

import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

from cachetier.client import ServerHandle, ensure_server
from cachetier.core.config import ConnectorConfig
from cachetier.core.messages import TIER_DISK, TIER_GPU, TIER_HOST, TIER_REMOTE
from cachetier_connector.facts import let_any_role, read_facts, read_identity, recompute_failed_loads
from cachetier_connector.plan import StepPlan, Verdict
from cachetier_connector.scheduler_half import SchedulerHalf
from cachetier_connector.worker_half import WorkerHalf

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


def log_like_vllm() -> None:
    """Have this project's log lines appear among vLLM's, in its format and at its level."""
    vllm_log = logging.getLogger("vllm")
    for name in ("cachetier", "cachetier_connector"):
        ours = logging.getLogger(name)
        if not ours.handlers:
            ours.handlers, ours.propagate = vllm_log.handlers, False
            ours.setLevel(vllm_log.level)


class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """The plan of one step, as vLLM carries it to the workers."""

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan


@dataclasses.dataclass(slots=True)
class StepReport(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What a worker tells the scheduler half with a step's output.

    Attributes:
        step: number of the step that ran.
        load_s: how long the loads took that ended meanwhile, by request.
        parts: by request that is blended and number of the part, up to which token each rank loaded it, if it did so
            meanwhile.
        computed: how many tokens blend passes computed in the step, by request.
        refusal: why the worker blends nothing, once it knows.
        verdict: what a check of a blended request found, on the ranks that know.
    """

    step: int = 0
    load_s: dict[str, float] = dataclasses.field(default_factory=dict)
    parts: dict[str, dict[int, list[int]]] = dataclasses.field(default_factory=dict)
    computed: dict[str, int] = dataclasses.field(default_factory=dict)
    refusal: str = ""
    verdict: Verdict | None = None

    def aggregate(self, other: "KVConnectorWorkerMetadata") -> "StepReport":
        """Return what two ranks tell: a load is as slow as its slowest rank, and all compute the same."""
        assert isinstance(other, StepReport)
        slowest = {name: max(seconds, other.load_s.get(name, 0.0)) for name, seconds in self.load_s.items()}
        parts = {name: dict(ends_of) for name, ends_of in other.parts.items()}
        for name, ends_of in self.parts.items():
            merged = parts.setdefault(name, {})
            merged.update({part: ends + merged.get(part, []) for part, ends in ends_of.items()})
        refusal, verdict = self.refusal or other.refusal, self.verdict or other.verdict
        return StepReport(self.step, other.load_s | slowest, parts, other.computed | self.computed, refusal, verdict)


class PrivateServer:
    """The server of an engine that was told of none; started, or started again, when it is asked for."""

    def __init__(self, config: ConnectorConfig) -> None:
        self._config = config
        self._handle: ServerHandle | None = None

    def find_socket(self) -> str:
        """Return the path of a live server's socket. Blocks while it starts.

        Raises:
            UnavailableError: it does not start; the text says why.
        """
        found = ensure_server(self._config)
        is_own = self._handle is not None and self._handle.process is not None and self._handle.process.poll() is None
        if not is_own:  # the own child, found again after it did not answer for a while, comes without its process
            self._handle = found
        return found.socket_path

    def stop(self) -> None:
        """Stop it if it is this engine's child."""
        if self._handle is not None:
            self._handle.stop()


class CachetierConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """vLLM's view of cachetier. See `SchedulerHalf` and `WorkerHalf` for what happens.

    It does not declare `SupportsHMA`: vLLM then keeps the KV of sliding-window layers of mixed models for all tokens,
    which is what lets cachetier serve them exactly.
    """

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        """Read the engine's configuration and, in the scheduler, connect to the server.

        Raises:
            ConfigError: a setting is wrong, or the model cannot be served exactly; the text says what to do.
            UnavailableError: no `server` is configured and the private one does not start.
        """
        super().__init__(vllm_config, role, kv_cache_config)
        log_like_vllm()
        self._facts = read_facts(vllm_config, kv_cache_config)
        self._private_server = PrivateServer(self._facts.config)
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        recompute_failed_loads(vllm_config)
        if role == KVConnectorRole.SCHEDULER:
            identity = read_identity(vllm_config, kv_cache_config, self._facts)
            let_any_role(vllm_config)
            self._scheduler = SchedulerHalf(self._facts, identity, self._private_server.find_socket)

    # Scheduler half.

    def on_new_request(self, request: "Request") -> None:
        self._scheduling.on_new_request(request)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduling.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        self._scheduling.update_state_after_alloc(request, blocks.get_block_ids()[0], num_external_tokens)

    def get_external_cache_hit_sources(self, request: "Request", num_external_tokens: int) -> dict[Any, int]:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource

        names = {
            TIER_GPU: CacheHitSource.DEVICE,
            TIER_HOST: CacheHitSource.HOST,
            TIER_DISK: CacheHitSource.DISK,
            TIER_REMOTE: CacheHitSource.EXTERNAL_UNSPECIFIED,
        }
        return {names[tier]: count for tier, count in self._scheduling.tiers_of(request).items()}

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> StepMetadata:
        return StepMetadata(self._scheduling.build_plan(scheduler_output))

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        report = connector_output.kv_connector_worker_meta
        if report is not None:
            self._scheduling.learn(report.step, report.load_s)
            self._scheduling.learn_of_blends(report.parts, report.computed, report.refusal)
            if report.verdict is not None:
                self._scheduling.learn_of_check(report.verdict)
        self._scheduling.update_from_workers(
            connector_output.finished_recving or (), connector_output.invalid_block_ids or set()
        )

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduling.request_finished(request), None

    def take_events(self) -> "Iterable[KVCacheEvent]":
        return self._scheduling.events.take()

    def reset_cache(self) -> bool | None:
        self._scheduling.reset()
        return True

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a chunk that is not stored is a miss later, nothing else

    # Worker half.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        group = self._kv_cache_config.kv_cache_groups[0]
        self._worker = WorkerHalf(self._facts, self._vllm_config, kv_caches, group.kv_cache_spec)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, StepMetadata)
        self._working.before_forward(kv_connector_metadata.plan)

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        self._working.start_loads(self._plan)

    def wait_for_save(self) -> None:
        self._working.after_forward(self._plan)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return self._working.take_released(), self._working.take_finished_loads()

    def build_connector_worker_meta(self) -> StepReport | None:
        working = self._working
        report = StepReport(
            self._plan.step,
            working.take_load_seconds(),
            working.take_parts(),
            working.take_computed(),
            working.take_refusal(),
            working.take_verdict(),
        )
        return None if report == StepReport() else report

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._working.take_bad_blocks()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: loads are asynchronous, and a request waits for its own outside of the forward pass."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: "AttentionMetadata", **kwargs: Any
    ) -> None:
        """Nothing: chunks are taken once all layers of a step are computed."""

    # Both halves.

    def shutdown(self) -> None:
        stops: list[Callable[[], None]] = [half.stop for half in (self._worker, self._scheduler) if half is not None]
        for stop in [*stops, self._private_server.stop]:
            stop()

    @property
    def _scheduling(self) -> SchedulerHalf:
        assert self._scheduler is not None, "called in a worker"
        return self._scheduler

    @property
    def _working(self) -> WorkerHalf:
        assert self._worker is not None, "called in the scheduler, or before the KV caches were registered"
        return self._worker

    @property
    def _plan(self) -> StepPlan:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata.plan
