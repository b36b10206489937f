"""One thread's connection to the server, with a breaker: nothing here ever makes the engine wait for a dead server.

A call that fails or misses its deadline opens the breaker: the session is given up and calls fail at once until a
probe, at most one a second, opens a new session. A link is used from one thread; `is_up` may be read from any.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

from cachetier.client import Client, Session
from cachetier.core.errors import CachetierError, ProtocolError
from cachetier.core.keys import ModelIdentity, NamespaceId, namespace_of
from cachetier.core.layout import KVLayout
from cachetier.core.message_base import Message
from cachetier.core.messages import OpenSessionReply, RegisterNamespace

PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 0.5
CHECK_INTERVAL_S = 0.2
NOT_FOUND = 404

log = logging.getLogger(__name__)


class ServerLink:
    """A session with the server that comes back by itself.

    Attributes:
        server: what the server said about itself when the present session was opened; None while there is none.
    """

    def __init__(self, name: str, engine: str, find_socket: Callable[[], str]) -> None:
        """Make a link that is down.

        Args:
            name: what this thread is, for people: "scheduler", "worker 0 store".
            engine: id that all processes of this engine share.
            find_socket: returns the path of the server's socket, empty while there is none; may start a server.
        """
        self._name, self._engine, self._find_socket = name, engine, find_socket
        self._client: Client | None = None
        self._session: Session | None = None
        self._registered: set[NamespaceId] = set()
        self._next_probe_s = self._next_check_s = 0.0
        self.server: OpenSessionReply | None = None

    @property
    def is_up(self) -> bool:
        """Whether calls are worth making."""
        return self.server is not None

    def probe(self) -> bool:
        """Return whether the link is up, after trying to bring it up if that is due. Blocks as `find_socket` does."""
        now = time.monotonic()
        if self._session is not None:
            if now >= self._next_check_s:
                self._next_check_s = now + CHECK_INTERVAL_S
                if not self._session.is_open():
                    self._open_breaker("the server closed the session")
            return self.is_up
        if now < self._next_probe_s:
            return False
        self._next_probe_s = now + PROBE_INTERVAL_S
        try:
            self.connect()
        except CachetierError as error:
            log.debug("cachetier: %s: still no server: %s", self._name, error)
        return self.is_up

    def connect(self) -> None:
        """Open a session now.

        Raises:
            CachetierError: there is no server, or it does not answer.
        """
        socket_path = self._find_socket()
        if not socket_path:
            return
        client = Client(socket_path)
        try:
            self._session = Session(client, self._name, self._engine, PROBE_TIMEOUT_S)
        except CachetierError:
            client.close()
            raise
        self._client = client
        self._registered.clear()
        self._next_check_s = time.monotonic() + CHECK_INTERVAL_S
        self.server = self._session.server
        log.info("cachetier: %s is connected to %s", self._name, socket_path)

    def call(self, make_message: Callable[[int], Message], timeout_s: float) -> Any:
        """Send the message that `make_message` makes for the session's id; return its reply, or None if it failed."""
        if self._client is None or self._session is None:
            return None
        try:
            return self._client.call(make_message(self._session.id), timeout_s)
        except ProtocolError as error:
            if error.status != NOT_FOUND:
                log.error("cachetier: %s: the server refused a request: %s", self._name, error)
                return None
            self._open_breaker(str(error))  # the session is gone: open another
        except CachetierError as error:
            self._open_breaker(str(error))
        return None

    def namespace(self, identity: ModelIdentity, layouts: list[KVLayout], timeout_s: float) -> NamespaceId | None:
        """Return the namespace of `identity`, registered in this session, or None if that failed."""
        namespace = namespace_of(identity)
        if namespace not in self._registered:
            reply = self.call(
                lambda session: RegisterNamespace(session=session, identity=identity, layouts=layouts), timeout_s
            )
            if reply is None:
                return None
            self._registered.add(namespace)
        return namespace

    def close(self) -> None:
        """Close the session; its leases are given back."""
        self.server = None
        if self._session is not None:
            self._session.close()
            self._session = None
        if self._client is not None:
            self._client.close()
            self._client = None

    def _open_breaker(self, reason: str) -> None:
        log.warning("cachetier: %s goes on without the cache: %s", self._name, reason)
        self.close()
        self._next_probe_s = time.monotonic() + PROBE_INTERVAL_S
