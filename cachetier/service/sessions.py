"""The sessions that a connection watches: each ends with its connection, so a killed client gives its leases back.

Lives on the event loop's thread. The store keeps sessions and leases, and ends by itself the sessions that nobody
watches and that stay silent; a watched one may be silent for as long as its connection stands.
"""

from cachetier.core.errors import ProtocolError
from cachetier.core.messages import Renew
from cachetier.store.store import Store


class WatchedSessions:
    """The sessions that are being watched."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._watched: set[int] = set()

    def watch(self, session: int) -> None:
        """Let `session` live until `end` is called.

        Raises:
            ProtocolError: it is unknown (404) or watched by another connection (409).
        """
        if session in self._watched:
            raise ProtocolError(f"session {session} is watched by another connection", 409)
        self._store.renew(Renew(session=session, leases=[]))
        self._watched.add(session)

    def end(self, session: int) -> None:
        """Close `session`: the store gives its leases back."""
        self._watched.discard(session)
        self._store.close_session(session)

    def renew(self) -> None:
        """Tell the store that the watched sessions live; their leases still have to be renewed by their owners."""
        for session in tuple(self._watched):
            try:
                self._store.renew(Renew(session=session, leases=[]))
            except ProtocolError:  # the store has ended it
                self._watched.discard(session)
