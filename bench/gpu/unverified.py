"""The connector without verification, for one question: what do checksums cost a load? Never to be used otherwise.

vLLM imports it through `kv_connector_module_path`. What is stored has its checksums; loads neither compute nor compare.
"""

from typing import Any

from cachetier_connector.connector import CachetierConnector
from cachetier_connector.cuda import staged_load
from cachetier_connector.cuda.kernels import scatter
from cachetier_connector.cuda.stage_plan import StagePlan


class UnverifiedConnector(CachetierConnector):  # type: ignore[misc]
    """Trusts every byte."""


def _skip(*_: Any) -> None:
    """Compute nothing."""


def _trust(*_: Any) -> bool:
    return True


def _scatter(*args: Any, digests: Any = None, **kwargs: Any) -> None:
    scatter(*args, **kwargs)


staged_load.digest_pages = _skip
staged_load.scatter = _scatter
StagePlan.matches = _trust
