"""A connector for tests: cachetier's, in an engine whose rotary tables are not what its configuration says."""

import torch

from cachetier_connector.model_keeper import loaded_model
from tests.e2e.loading_connector import LoadingConnector


class TamperedConnector(LoadingConnector):
    """Keys of position p are turned as those of position p * 1.05 should be, from before the first is computed."""

    def register_kv_caches(self, kv_caches):
        for module in loaded_model().modules():
            if (table := getattr(module, "cos_sin_cache", None)) is not None:
                numbers = (torch.arange(len(table)) * 1.05).long().clamp(max=len(table) - 1)
                table.copy_(table[numbers].clone())
        super().register_kv_caches(kv_caches)
