"""What `cachetier warm --document` asks at its end: whether the server knows the documents that were sent.

An engine without the connector, or with another server, computes documents like any prompts and registers none.
"""

import time
from collections.abc import Collection

from cachetier.cli.documents import list_documents
from cachetier.client.client import Client

WAITS_S = (0.0, 0.5, 2.0)  # an engine registers a document shortly after it has answered
NAMES_SHOWN = 5


def unregistered(client: Client, weights: str, sent: Collection[str]) -> list[str]:
    """Return which of the documents that were `sent` are not registered for the model with these `weights`.

    Raises:
        UnavailableError: no server answers.
    """
    missing = set(sent)
    for wait_s in WAITS_S:
        if missing:
            time.sleep(wait_s)
            missing -= {each.document for each in list_documents(client) if each.model == weights}
    return sorted(missing)


def as_text(num_sent: int, missing: list[str]) -> str:
    """Return the result for people."""
    if not missing:
        return f"all {num_sent} are registered"
    names = ", ".join(map(repr, missing[:NAMES_SHOWN])) + (", ..." if len(missing) > NAMES_SHOWN else "")
    return (
        f"{len(missing)} of {num_sent} are not registered: {names}; the engine has no cachetier connector, uses "
        "another server or stores nothing: its log may say why"
    )
