"""The connector that writes down when each load did what, for `profile`. Otherwise as ever.

vLLM imports it through `kv_connector_module_path`. Its log lines carry the clock that the bench's own times are of.
"""

import logging
import sys
import time

from cachetier_connector.connector import CachetierConnector


class ProfiledConnector(CachetierConnector):  # type: ignore[misc]
    """Differs in nothing but what is logged."""


class Stamped(logging.Formatter):
    """Puts the monotonic clock before each line."""

    def format(self, record: logging.LogRecord) -> str:
        return f"@{time.monotonic():.6f} {super().format(record)}"


_handler = logging.StreamHandler(sys.stderr)
_handler.setFormatter(Stamped())
for _name in ("loader", "scheduler_half"):
    _log = logging.getLogger(f"cachetier_connector.{_name}")
    _log.addHandler(_handler)
    _log.setLevel(logging.DEBUG)
    _log.propagate = False
