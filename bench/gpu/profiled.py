"""The connector that writes down when each load, store and step did what, for `profile`. Otherwise as ever.

vLLM imports it through `kv_connector_module_path`. Its log lines carry the clock that the bench's own times are of.
"""

import logging
import sys
import time
from typing import Any

from cachetier_connector.connector import CachetierConnector

log = logging.getLogger(f"cachetier_connector.{__name__}")


class ProfiledConnector(CachetierConnector):  # type: ignore[misc]
    """Differs in nothing but what is logged."""

    _began_s = 0.0

    def start_load_kv(self, *arguments: Any, **named: Any) -> None:
        self._began_s = time.monotonic()
        super().start_load_kv(*arguments, **named)

    def wait_for_save(self) -> None:
        launched_ms = 1000 * (time.monotonic() - self._began_s)
        super().wait_for_save()
        log.debug("cachetier: step %d was launched in %.2f ms", self._plan.step, launched_ms)

    def update_connector_output(self, connector_output: Any) -> None:
        super().update_connector_output(connector_output)
        if report := connector_output.kv_connector_worker_meta:
            log.debug("cachetier: step %d has ended", report.step)


class Stamped(logging.Formatter):
    """Puts the monotonic clock before each line."""

    def format(self, record: logging.LogRecord) -> str:
        return f"@{time.monotonic():.6f} {super().format(record)}"


_handler = logging.StreamHandler(sys.stderr)
_handler.setFormatter(Stamped())
for _name in ("loader", "scheduler_half", "storer", __name__):
    _log = logging.getLogger(f"cachetier_connector.{_name}")
    _log.addHandler(_handler)
    _log.setLevel(logging.DEBUG)
    _log.propagate = False
