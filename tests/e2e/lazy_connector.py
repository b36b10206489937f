"""A connector for tests: cachetier's, on the CPU, with a copy engine that keeps blocks as one for GPUs does.

Importing it makes cachetier, in this process, take the engine for one that keeps blocks; each chunk is read a while
after the step that completed it, so that blocks which vLLM gives to others too early hold other KV by then.
"""

import dataclasses
import time

from cachetier_connector import connector, copy_factory
from tests.connector.lazy_engine import LazyCopyEngine

CHUNK_S = 0.04

_read_facts = connector.read_facts


class SlowCopyEngine(LazyCopyEngine):
    """Takes `CHUNK_S` or longer for each chunk that is stored."""

    @staticmethod
    def before_chunk():
        time.sleep(CHUNK_S)


connector.read_facts = lambda *configs: dataclasses.replace(_read_facts(*configs), device="cuda")
copy_factory.CpuCopyEngine = SlowCopyEngine


class LazyConnector(connector.CachetierConnector):
    """As its base."""
