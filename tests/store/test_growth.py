"""Nothing grows: after a hundred thousand requests the process is as large as after the first ten thousand."""

import random
import re
from pathlib import Path

import pytest

from cachetier.core.messages import Report
from cachetier.store.store import Store
from tests.store.engines import MIB, Engine, make_config, tokens_of

GROWTH_MAX_BYTES = 4 * MIB


def anonymous_bytes() -> int:
    """Return the memory of this process that is neither files nor the arena."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


class Load:
    """Requests of all kinds, ten times as many chunks as the arena and the disk hold, engines that come and go."""

    def __init__(self, store: Store) -> None:
        self.store, self.chance, self.num_requests = store, random.Random(9), 0
        self.engine = Engine(store)

    def run(self, num_requests: int) -> None:
        end = self.num_requests + num_requests
        while self.num_requests < end:
            prompt = tokens_of(self.chance.randrange(5), *(self.chance.randrange(200) for _ in range(3)))
            reply = self.engine.match(prompt)
            filled = self.engine.fill(prompt)
            if self.chance.random() < 0.1:
                filled.checksums[0] = None
            self.engine.commit(filled)
            self.engine.release(reply)
            self.num_requests += 4
            if self.chance.random() < 0.01:
                self.store.report(Report(session=self.engine.sessions[0], stores_dropped=1))
                self.engine.match(prompt)
                self.engine.fill(tokens_of(999, self.num_requests))
                self.engine.close()
                self.engine = Engine(self.store, f"engine {self.num_requests}")
                self.num_requests += 5
            self.store.expire()
            if self.chance.random() < 0.01:  # the disk gets its turn: what it cannot keep up with would be dropped
                self.store.flush()


@pytest.mark.slow
def test_a_hundred_thousand_requests_leave_nothing_behind(tmp_path):
    store = Store(make_config(tmp_path, disk_bytes=16 * MIB))
    load = Load(store)
    load.run(20_000)
    store.flush()
    before = anonymous_bytes()
    load.run(80_000)
    store.flush()
    grown = anonymous_bytes() - before
    load.engine.close()
    store.check_integrity()
    stats = store.stats()
    assert stats.leases == stats.sessions == stats.chunks_pending == stats.flush_backlog_bytes == 0
    assert stats.host_evicted > 10 * stats.chunks_host
    assert stats.disk["evicted"] > 10 * stats.chunks_durable
    assert stats.promoted > 100
    store.close()
    assert grown < GROWTH_MAX_BYTES, f"{grown} bytes more"
