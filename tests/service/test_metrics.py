"""Every number of the statistics is a metric, and the metrics agree with the statistics."""

from pathlib import Path
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from cachetier.service.metrics import DISK_COUNTERS, METRICS
from cachetier.store.stats import Stats
from tests.service.running import TIMEOUT_S, RunningServer, TinyEngine, tokens_of

NO_METRIC = {"instance", "disk"}  # a text; a dictionary that has a family of its own


def leaves(kind: Any, prefix: str = "") -> set[str]:
    found = set()
    for field in msgspec.structs.fields(kind):
        path = f"{prefix}{field.name}"
        is_struct = isinstance(field.type, type) and issubclass(field.type, msgspec.Struct)
        found |= leaves(field.type, f"{path}.") if is_struct else {path}
    return found


def samples_of(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(s.labels.values())): s.value for family in families for s in family.samples}


def test_every_number_of_the_statistics_is_in_the_table() -> None:
    assert {metric.path for metric in METRICS} == leaves(Stats) - NO_METRIC


def test_names_are_prefixed_and_no_label_comes_from_a_request() -> None:
    assert all(metric.name.startswith("cachetier_") and metric.help.endswith(".") for metric in METRICS)
    assert {metric.label[0] for metric in METRICS if metric.label} == {"tier", "work"}


def test_metrics_agree_with_statistics(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "data") as server:
        engine = TinyEngine(server.socket_path)
        engine.store(tokens_of(1, 3))
        engine.release(engine.match(tokens_of(1, 5)))
        stats = msgspec.json.decode(engine.client.get("/v1/stats", TIMEOUT_S))
        samples = samples_of(engine.client.get("/metrics", TIMEOUT_S).decode())
        assert samples["cachetier_tokens_queried_total", ()] == stats["tokens"]["queried"] == 5 * 64
        assert samples["cachetier_tokens_stored_total", ()] == stats["tokens"]["stored"] == 3 * 64
        assert samples["cachetier_tier_limit_bytes", ("host",)] == stats["bytes"]["host"]["limit"]
        assert samples["cachetier_chunks", ()] == 3
        assert samples["cachetier_request_duration_seconds_count", ("Match",)] == 1
        assert samples["cachetier_process_resident_memory_bytes", ()] > 1 << 20
        assert {labels[0] for name, labels in samples if name == DISK_COUNTERS} == set(stats["disk"])
        engine.close()
