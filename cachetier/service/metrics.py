"""Prometheus metrics: the store's snapshot, and the latency of requests by kind. On the event loop's thread.

One table says under which name each number of `Stats` appears; a test compares the table with the struct, so a new
number cannot be forgotten. Names are in base units. Neither salts nor keys can get in: no label comes from a request.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from cachetier.store.stats import Stats

LATENCY_BUCKETS_S = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.5)


class Metric(NamedTuple):
    """Where a number of `Stats` goes: the path to it, and its family (a name in _total is a counter) and label."""

    path: str
    name: str
    help: str
    label: tuple[str, str] | None = None


PREFILL, LOAD = ("work", "prefill"), ("work", "load")
METRICS = (
    Metric("uptime_s", "cachetier_uptime_seconds", "Time since the store opened."),
    Metric("tokens.queried", "cachetier_tokens_queried_total", "Tokens in complete chunks of matched prompts."),
    Metric("tokens.hit.gpu", "cachetier_tokens_hit_total", "Tokens loaded and used.", ("tier", "gpu")),
    Metric("tokens.hit.host", "cachetier_tokens_hit_total", "Tokens loaded and used.", ("tier", "host")),
    Metric("tokens.hit.disk", "cachetier_tokens_hit_total", "Tokens loaded and used.", ("tier", "disk")),
    Metric("tokens.hit.remote", "cachetier_tokens_hit_total", "Tokens loaded and used.", ("tier", "remote")),
    Metric("tokens.stored", "cachetier_tokens_stored_total", "Tokens of chunks that became ready."),
    Metric("tokens.waited", "cachetier_tokens_waited_total", "Tokens loaded that the match had to wait for."),
    Metric("tokens.blend.loaded", "cachetier_tokens_blend_loaded_total", "Tokens loaded from documents in prompts."),
    Metric("tokens.blend.computed", "cachetier_tokens_blend_computed_total", "Tokens computed between these."),
    Metric("requests.blended", "cachetier_requests_blended_total", "Requests that loaded documents in their prompts."),
    Metric("blend.checked", "cachetier_blend_checked_total", "Blended requests computed again in full."),
    Metric("blend.agreed", "cachetier_blend_agreed_total", "Of these, those with the same next token both ways."),
    Metric("blend.kl", "cachetier_blend_kl_nats_total", "Divergence of the blended next token, summed over these."),
    Metric("bytes.gpu.used", "cachetier_tier_used_bytes", "Bytes that the tier uses.", ("tier", "gpu")),
    Metric("bytes.host.used", "cachetier_tier_used_bytes", "Bytes that the tier uses.", ("tier", "host")),
    Metric("bytes.disk.used", "cachetier_tier_used_bytes", "Bytes that the tier uses.", ("tier", "disk")),
    Metric("bytes.gpu.limit", "cachetier_tier_limit_bytes", "Most bytes the tier may use.", ("tier", "gpu")),
    Metric("bytes.host.limit", "cachetier_tier_limit_bytes", "Most bytes the tier may use.", ("tier", "host")),
    Metric("bytes.disk.limit", "cachetier_tier_limit_bytes", "Most bytes the tier may use.", ("tier", "disk")),
    Metric("bytes.remote.put", "cachetier_remote_put_bytes_total", "Bytes put into the remote store."),
    Metric("bytes.remote.got", "cachetier_remote_got_bytes_total", "Bytes got from the remote store."),
    Metric("chunks", "cachetier_chunks", "Distinct chunks held."),
    Metric("chunks_gpu", "cachetier_chunks_gpu", "Chunks with a copy in a pool in device memory."),
    Metric("chunks_host", "cachetier_chunks_host", "Chunks ready in host memory."),
    Metric("chunks_durable", "cachetier_chunks_durable", "Chunks on disk that survive a crash."),
    Metric("chunks_pending", "cachetier_chunks_pending", "Chunks being stored."),
    Metric("leases", "cachetier_leases", "Live leases."),
    Metric("sessions", "cachetier_sessions", "Open sessions."),
    Metric("namespaces", "cachetier_namespaces", "Known models."),
    Metric("documents", "cachetier_documents", "Registered documents."),
    Metric("flush_backlog_bytes", "cachetier_flush_backlog_bytes", "Bytes waiting to be written to disk."),
    Metric("checksum_failures", "cachetier_checksum_failures_total", "Chunks that a reader found damaged."),
    Metric("stores_dropped", "cachetier_stores_dropped_total", "Chunks that were not stored for want of room or time."),
    Metric("loads_failed", "cachetier_loads_failed_total", "Requests recomputed after a failed load."),
    Metric("matches_late", "cachetier_matches_late_total", "Requests computed since their match came too late."),
    Metric("gpu_filled", "cachetier_gpu_filled_total", "Copies made in pools in device memory."),
    Metric("gpu_evicted", "cachetier_gpu_evicted_total", "Copies evicted from pools in device memory."),
    Metric("hits_cut", "cachetier_hits_cut_total", "Hits of which a part was computed because that was faster."),
    Metric("tokens_cut", "cachetier_tokens_cut_total", "Tokens held and yet computed because that was faster."),
    Metric("tokens_per_s.prefill", "cachetier_engine_tokens_per_second", "As an engine measured it.", PREFILL),
    Metric("tokens_per_s.load", "cachetier_engine_tokens_per_second", "As an engine measured it.", LOAD),
    Metric("disk_bytes_per_s", "cachetier_disk_read_bytes_per_second", "How fast the disk gave chunks lately."),
    Metric("remote_bytes_per_s", "cachetier_remote_read_bytes_per_second", "How fast the remote store gave chunks."),
    Metric("remote_available", "cachetier_remote_available", "Whether the remote store is used now, 0 or 1."),
    Metric("host_evicted", "cachetier_host_evicted_total", "Chunks evicted from the host tier."),
    Metric("promoted", "cachetier_promoted_total", "Chunks read from disk into host memory."),
    Metric("promotions_failed", "cachetier_promotions_failed_total", "Chunks whose reading failed."),
    Metric("promotions_skipped", "cachetier_promotions_skipped_total", "Chunks that nobody leased any more."),
    Metric("flushed", "cachetier_flushed_total", "Chunks written to disk."),
    Metric("flushes_failed", "cachetier_flushes_failed_total", "Chunks that the disk tier did not take."),
    Metric("flushes_dropped", "cachetier_flushes_dropped_total", "Chunks not flushed because the backlog was full."),
    Metric("leases_expired", "cachetier_leases_expired_total", "Leases that ended without being released."),
    Metric("remote_failures", "cachetier_remote_failures_total", "Calls to the remote store that failed or were late."),
    Metric("remote_puts_dropped", "cachetier_remote_puts_dropped_total", "Chunks that were not put there."),
)
DISK_COUNTERS = "cachetier_disk_events_total"


class Metrics:
    """The registry behind `/metrics`."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, snapshot: Callable[[], Stats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_StatsCollector(snapshot))
        ProcessCollector(namespace="cachetier", registry=self._registry)
        self._latency = Histogram(
            "cachetier_request_duration_seconds",
            "Time to answer a message, from its last byte received to its reply made.",
            ["request"],
            registry=self._registry,
            buckets=LATENCY_BUCKETS_S,
        )

    def observer(self, request: str) -> Callable[[float], None]:
        """Return the function that records a latency in seconds of messages of kind `request`."""
        return self._latency.labels(request).observe

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _StatsCollector(Collector):
    """Gives one snapshot, in which the numbers fit each other, per scrape."""

    def __init__(self, snapshot: Callable[[], Stats]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterator[Any]:
        return iter(())  # the names are ours alone: no need to take a snapshot in order to register

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        values = msgspec.to_builtins(self._snapshot())
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for metric in METRICS:
            value = values
            for part in metric.path.split("."):
                value = value[part]
            if metric.name not in families:
                kind = CounterMetricFamily if metric.name.endswith("_total") else GaugeMetricFamily
                families[metric.name] = kind(metric.name, metric.help, labels=metric.label[:1] if metric.label else ())
            families[metric.name].add_metric(metric.label[1:] if metric.label else (), value)
        yield from families.values()
        disk = CounterMetricFamily(DISK_COUNTERS, "What happened in the disk tier.", labels=("event",))
        for event, count in values["disk"].items():
            disk.add_metric((event,), count)
        yield disk
