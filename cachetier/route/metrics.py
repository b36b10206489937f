"""Prometheus metrics of the router. On the event loop's thread. No label comes from a request."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from cachetier.route.fleet import Fleet

BUCKETS_S = (0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
DECODE, PREFILL = "decode", "prefill"  # the values of the label `work`


class RouteMetrics:
    """The registry behind `/metrics`.

    Attributes:
        requests: requests sent to an engine, by engine and work.
        failures: those that it did not answer or broke off.
        retries: requests that were sent to another engine because one failed before its answer began.
        gone: requests whose client went away before the answer began.
        first_byte_s: seconds from a request's arrival to the first bytes of its answer.
        seconds: seconds that a request's answer, or a prefill, took.
    """

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, fleet: Fleet) -> None:
        self._registry = registry = CollectorRegistry()
        by = ("engine", "work")
        self.requests = Counter("cachetier_route_requests", "Requests sent to an engine.", by, registry=registry)
        self.failures = Counter("cachetier_route_failures", "Of these, those that failed.", by, registry=registry)
        self.retries = Counter("cachetier_route_retries", "Requests sent to another engine.", registry=registry)
        self.gone = Counter(
            "cachetier_route_gone", "Requests whose client did not wait for an answer.", registry=registry
        )
        self.first_byte_s = Histogram(
            "cachetier_route_first_byte_seconds",
            "From a request's arrival to the first bytes of its answer.",
            registry=registry,
            buckets=BUCKETS_S,
        )
        self.seconds = Histogram(
            "cachetier_route_request_seconds",
            "From a request's arrival to the end of its answer; of a prefill, until it is done.",
            ["work"],
            registry=registry,
            buckets=BUCKETS_S,
        )
        registry.register(_FleetCollector(fleet))
        ProcessCollector(namespace="cachetier_route", registry=registry)

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _FleetCollector(Collector):
    """Says per scrape which engines there are, and what they have to do."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def describe(self) -> Iterator[GaugeMetricFamily]:
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        up = GaugeMetricFamily("cachetier_route_engine_up", "Whether it answers.", labels=("engine", "role"))
        in_flight = GaugeMetricFamily(
            "cachetier_route_in_flight", "Requests that it has now.", labels=("engine", "role")
        )
        for engine in self._fleet.engines:
            up.add_metric((engine.name, engine.role), engine.is_up)
            in_flight.add_metric((engine.name, engine.role), engine.num_in_flight)
        yield up
        yield in_flight
