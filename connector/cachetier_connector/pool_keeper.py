"""What the store thread says to the server about pools in device memory: offers, and what has become of others' pools.

On the worker's store thread, which owns the link. Copies are committed by the thread's jobs; see `Storer.commit_pool`.
"""

import time

from cachetier.core.layout import Shard
from cachetier.core.messages import OpenSessionReply
from cachetier.core.pool_messages import CheckPools, OfferPool
from cachetier_connector.copy_base import CopyEngine
from cachetier_connector.link import ServerLink

CHECK_INTERVAL_S = 1.0
CALL_TIMEOUT_S = 1.0


class PoolKeeper:
    """Offers the worker's pool in every new session, and closes the pools of engines that are gone."""

    def __init__(self, engine: CopyEngine, link: ServerLink, tiling: list[Shard], shard: int) -> None:
        """Do nothing yet. See `Storer` for the arguments."""
        self._engine, self._link, self._tiling, self._shard = engine, link, tiling, shard
        self._offered_to: OpenSessionReply | None = None
        self._next_check_s = 0.0

    def tend(self) -> None:
        """Do what is due; the link is up. Cheap when nothing is."""
        pools, server = self._engine.pools, self._link.server
        if pools is None or server is None:
            return
        if server is not self._offered_to:
            self._offered_to = server
            self._offer(server)
        now = time.monotonic()
        if now >= self._next_check_s:
            self._next_check_s = now + CHECK_INTERVAL_S
            if opened := pools.opened():
                reply = self._link.call(lambda session: CheckPools(session=session, pools=opened), CALL_TIMEOUT_S)
                if reply is not None:
                    pools.close_gone(reply.gone)

    def _offer(self, server: OpenSessionReply) -> None:
        pools = self._engine.pools
        offer = pools.offer(self._engine.shard_bytes(server.chunk_tokens)) if pools is not None else None
        if offer is not None:
            self._link.call(
                lambda session: OfferPool(
                    session=session,
                    tiling=self._tiling,
                    shard=self._shard,
                    object_bytes=offer.object_bytes,
                    num_frames=offer.num_frames,
                    device=offer.device,
                    handle=offer.handle,
                ),
                CALL_TIMEOUT_S,
            )
