"""Pools in device memory on a device without a GPU: see `pool_cases`; and what becomes of pools that are gone."""

import functools

import msgspec
import pytest
import torch

from cachetier.core.errors import ConfigError
from cachetier.core.pool_messages import POOL_FILL
from cachetier_connector.cuda import copy_cuda, staged_load
from cachetier_connector.cuda.copy_cuda import StagedCopyEngine
from tests.connector.cuda import plain_kernels
from tests.connector.cuda.copy_cases import CHUNK, LAYOUT, WHOLE, Tier, blocks_for, kv_of, load_op
from tests.connector.cuda.host_device import HostDevice
from tests.connector.cuda.pool_cases import PoolCases, carry_out, pool_of, pooled_rank


@pytest.fixture(autouse=True)
def _kernels(monkeypatch) -> None:
    for module in (copy_cuda, staged_load):
        for name, kernel in plain_kernels.of(module).items():
            monkeypatch.setattr(module, name, kernel)


@pytest.fixture
def hosts() -> list[HostDevice]:
    """The devices of all workers of a test, which can open each other's memory."""
    return []


@pytest.fixture
def make(hosts):
    def make_one(*args: object, **settings: object) -> StagedCopyEngine:
        host = HostDevice(seed=len(hosts))
        hosts.append(host)
        host.peers = hosts
        return StagedCopyEngine(host, *args, warm_up_tokens=CHUNK, **settings)

    return make_one


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


@pytest.fixture
def tier(tmp_path) -> Tier:
    return Tier(tmp_path)


class TestOnTheHost(PoolCases):
    pass


@pytest.fixture
def filled(make, device, tier):
    """A rank whose pool holds two chunks, the chunks, and the op that reads them."""
    kv, blocks = kv_of(1, 2 * CHUNK), blocks_for(2 * CHUNK)
    chunks = [tier.put(kv, WHOLE, number) for number in range(2)]
    owner = pooled_rank(make, device, LAYOUT.whole(), has_pool=True)
    op = load_op([WHOLE], blocks, 0, 2 * CHUNK)
    to_fill = [chunk._replace(pool=POOL_FILL, pool_frame=number) for number, chunk in enumerate(chunks)]
    assert carry_out(owner, tier, op, to_fill) == (2, None, [0, 1])
    in_pool = [chunk._replace(pool=1, pool_frame=number) for number, chunk in enumerate(chunks)]
    return owner, in_pool, msgspec.structs.replace(op, pools=[pool_of([owner])])


def test_a_pool_that_is_gone_is_closed_once_no_load_reads_it(make, device, tier, hosts, filled):
    _, chunks, op = filled
    reader = pooled_rank(make, device, LAYOUT.whole(), has_pool=False)
    pools, host = reader.engine.pools, hosts[-1]
    first, second = (reader.engine.open_load(tier.view, op, None) for _ in range(2))
    first.push(chunks)
    second.push(chunks)
    assert (pools.opened(), len(host.opened)) == ([1], 1), "opened once for both"
    pools.close_gone([1, 2])
    assert first.finish() == 2
    assert len(host.opened) == 1, "the second load reads it still"
    assert second.finish() == 2
    assert (pools.opened(), host.opened) == ([], [])


def test_a_pool_that_stands_stays_open_between_loads(make, device, tier, hosts, filled):
    _, chunks, op = filled
    reader = pooled_rank(make, device, LAYOUT.whole(), has_pool=False)
    assert carry_out(reader, tier, op, chunks)[0] == 2
    reader.engine.pools.close_gone([])
    assert reader.engine.pools.opened() == [1]
    reader.engine.stop()
    assert hosts[-1].opened == []


def test_stopping_gives_the_memory_of_the_pool_back(hosts, filled):
    owner, _, _ = filled
    assert len(hosts[0].allocated) == 1
    owner.engine.stop()
    assert hosts[0].allocated == {}


def test_a_pool_that_does_not_fit_is_an_error_that_says_what_to_do(device):
    host = HostDevice()
    host.memory_bytes = 1
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        pooled_rank(functools.partial(StagedCopyEngine, host), device, LAYOUT.whole(), has_pool=True)


def test_a_pool_smaller_than_a_chunk_is_not_offered(make, filled):
    owner, _, _ = filled
    assert owner.engine.pools.offer(1 << 40) is None


def test_a_frame_outside_of_the_pool_fails_the_load_and_not_the_process(tier, filled):
    owner, chunks, op = filled
    run = owner.engine.open_load(tier.view, op, None)
    with pytest.raises(ValueError, match="outside of the pool"):
        run.push([chunks[0]._replace(pool=POOL_FILL, pool_frame=1 << 20)])
    assert run.finish() == 0
    assert run.filled == []
