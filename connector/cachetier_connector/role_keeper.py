"""Who this engine is and what it does: told to the server once a second, which may answer with another role.

`tend` runs on the matcher's thread, which owns the link; the rest may be read from any.
"""

import logging
import time

from cachetier.core.engine_messages import BOTH, CONSUMER, PRODUCER, AnnounceEngine
from cachetier.core.keys import ModelIdentity
from cachetier_connector.facts import EngineFacts
from cachetier_connector.link import ServerLink

INTERVAL_S = 1.0
REFUSED_INTERVAL_S = 30.0  # the name is another's: that may change
CALL_TIMEOUT_S = 1.0

log = logging.getLogger(__name__)


class RoleKeeper:
    """Announces the engine."""

    def __init__(self, link: ServerLink, facts: EngineFacts, identity: ModelIdentity) -> None:
        """Do nothing yet; `identity` is that of the model without an adapter."""
        self._link, self._facts, self._identity = link, facts, identity
        self._role, self._next_s = facts.role, 0.0

    @property
    def loads(self) -> bool:
        """Whether requests that arrive now may load."""
        return self._role in (CONSUMER, BOTH)

    @property
    def stores(self) -> bool:
        """Whether requests that arrive now may store."""
        return self._role in (PRODUCER, BOTH)

    @property
    def promises(self) -> bool:
        """Whether others may count on requests that arrive now being stored."""
        return self._role == PRODUCER

    @property
    def waits_for_promised(self) -> bool:
        """Whether requests that arrive now wait for what others have promised."""
        return self._role == CONSUMER

    def tend(self) -> None:
        """Do what is due. Cheap when nothing is."""
        now = time.monotonic()
        if now < self._next_s or not self._link.is_up:
            return
        self._next_s = now + INTERVAL_S
        facts = self._facts
        namespace = self._link.namespace(self._identity, [facts.layout], CALL_TIMEOUT_S)
        if namespace is None:
            return
        reply = self._link.call(
            lambda session: AnnounceEngine(
                session=session,
                name=facts.name,
                role=self._role,
                namespace=namespace,
                tensor_parallel=facts.tensor_parallel,
                pipeline_parallel=facts.pipeline_parallel,
                block_tokens=facts.block_tokens,
                url=facts.config.url,
            ),
            CALL_TIMEOUT_S,
        )
        if reply is None:
            self._next_s = now + (REFUSED_INTERVAL_S if self._link.is_up else INTERVAL_S)
        elif reply.role != self._role:
            log.info("cachetier: this engine was a %s and is a %s from now on", self._role, reply.role)
            self._role = reply.role
