"""A connector for tests: cachetier's, in an engine that is slow for some requests, however fast the machine is."""

import time

from cachetier_connector.connector import CachetierConnector

STEP_S = 0.03


class PacedConnector(CachetierConnector):
    """Every step with a request whose name starts with "paced" takes `STEP_S` or longer."""

    def build_connector_meta(self, scheduler_output):
        if any(name.startswith("paced") for name in scheduler_output.num_scheduled_tokens):
            time.sleep(STEP_S)
        return super().build_connector_meta(scheduler_output)
