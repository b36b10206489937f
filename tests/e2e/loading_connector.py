"""A connector for tests: cachetier's, which loads whatever is held, also where computing would be faster.

Small models compute as fast as they are loaded; hits that are counted must not depend on which is faster today.
"""

from cachetier_connector.break_even import Choice
from cachetier_connector.connector import CachetierConnector

PATIENCE_S = 5.0


class LoadingConnector(CachetierConnector):
    """Takes every hit whole, and waits for its chunks."""

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        if self._scheduler is not None:
            self._scheduler._break_even.choose = lambda hit: Choice(len(hit.tiers), PATIENCE_S)
