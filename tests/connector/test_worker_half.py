"""The worker half: what it does with a plan, in a worker that stores and in one whose heads another one stores."""

import dataclasses
import threading
from types import SimpleNamespace

import msgspec
import pytest
import torch

from cachetier.core.config import ConnectorConfig
from cachetier_connector import copy_factory
from cachetier_connector.facts import read_facts
from cachetier_connector.plan import StepPlan, tiling_for
from cachetier_connector.worker_half import WorkerHalf
from tests.connector.engines import HEAD_SIZE, HEADS, LAYERS, kv_cache_config, vllm_config
from tests.connector.lazy_engine import LazyCopyEngine
from tests.connector.servers import TIMEOUT_S, connect, eventually, identity, store_op, tokens_of

BLOCK = 128


def worker_of(server: str, *, num_tp: int, rank: int) -> WorkerHalf:
    """Return a worker of an engine that keeps blocks."""
    config = vllm_config()
    facts = read_facts(config, kv_cache_config())
    config.parallel_config.tensor_parallel_size, config.parallel_config.rank = num_tp, rank
    tiling = tiling_for(LAYERS, HEADS, num_tp, [(0, LAYERS)])
    facts = dataclasses.replace(facts, device="cuda", tiling=tiling, config=ConnectorConfig(server=f"unix:{server}"))
    heads = max(1, HEADS // num_tp)
    caches = {
        f"model.layers.{layer}.self_attn.attn": torch.zeros(8, heads, BLOCK, 2 * HEAD_SIZE, dtype=torch.bfloat16)
        for layer in range(LAYERS)
    }
    return WorkerHalf(facts, config, caches, spec=None)


@pytest.fixture
def keeps_blocks(monkeypatch):
    monkeypatch.setattr(copy_factory, "CpuCopyEngine", LazyCopyEngine)


@pytest.mark.parametrize(("num_tp", "rank"), [(1, 0), (8, 0), (8, 1)])
@pytest.mark.parametrize("has_server", [True, False])
def test_every_worker_reports_the_held_requests_and_no_others(server, keeps_blocks, num_tp, rank, has_server):
    """Those too that hold what another one stores (of eight ranks and four heads, every other one), and without a
    forward pass: vLLM 0.26 does not call `wait_for_save` then."""
    worker = worker_of(server.socket_path if has_server else "/nowhere", num_tp=num_tp, rank=rank)
    store = store_op(b"n" * 16, tokens_of(1, BLOCK), [3], chunk_tokens=BLOCK)
    worker.after_forward(StepPlan(stores_after=[store]))
    worker.before_forward(StepPlan(stores_before=[store], finished=["r", "other"], held=["r"]))
    assert eventually(worker.take_released) == {"r"}
    assert worker.take_released() == set()
    worker.stop()


@pytest.mark.parametrize("is_preempted", [True, False])
def test_stores_of_a_request_that_was_preempted_before_it_ended_are_cancelled(server, keeps_blocks, is_preempted):
    worker, reads, link = worker_of(server.socket_path, num_tp=1, rank=0), [], connect(server)
    model = msgspec.structs.replace(identity("worker"), num_layers=LAYERS, num_kv_heads=HEADS)
    namespace = link.namespace(model, [worker._engine._layout], TIMEOUT_S)
    worker._engine.before_chunk = lambda: reads.append("read")
    eventually(lambda: worker._storer._link.is_up)
    store = store_op(namespace, tokens_of(is_preempted, BLOCK), [3])
    preempted = ["r"] if is_preempted else []
    worker.before_forward(StepPlan(stores_before=[store], preempted=preempted, finished=["r"], held=["r"]))
    assert eventually(worker.take_released) == {"r"}
    assert reads == ([] if is_preempted else ["read", "read"])
    worker.stop()
    link.close()


def test_reading_from_disk_is_not_measured_before_the_engine_serves(server, keeps_blocks, monkeypatch):
    """It would load and be measured beside whatever else an engine does when it starts."""
    measured = []
    monkeypatch.setattr(LazyCopyEngine, "measure_direct", lambda self, folder: measured.append(folder) or 0.0)
    worker = worker_of(server.socket_path, num_tp=1, rank=0)
    done = threading.Event()
    for _ in range(3):  # each job is behind a look at what is due
        worker._storer._jobs.put(lambda: None)
    worker._storer._jobs.put(done.set)
    assert done.wait(TIMEOUT_S)
    assert worker._storer._link.is_up
    assert measured == []
    worker.before_forward(StepPlan(step=1, finished=["r"]))
    assert eventually(lambda: measured)
    worker.stop()


def test_loads_wait_for_passes_of_the_blender_and_not_for_those_of_the_engine(server, keeps_blocks, monkeypatch):
    """vLLM keeps the blocks that its own steps under way touch from loads; those of our passes it does not know of."""
    worker, seen, fences = worker_of(server.socket_path, num_tp=1, rank=0), [], iter(range(9))
    monkeypatch.setattr(worker, "_blender", SimpleNamespace(carry_out=seen.append, check=seen.append))
    monkeypatch.setattr(worker._engine, "fence", lambda: next(fences))
    monkeypatch.setattr(worker._loader, "submit", lambda load, fence: seen.append((load, fence)))
    plans = [
        StepPlan(step=1, loads=["a"]),
        StepPlan(step=2, loads=["b"], blends=["pass"]),
        StepPlan(step=3, loads=["c"], check="check"),
        StepPlan(loads=["d", "e"]),
    ]
    for plan in plans:
        worker.start_loads(plan)
    assert seen == [("a", None), ("b", None), ["pass"], ("c", 0), "check", ("d", 1), ("e", 1)]
    worker.stop()
