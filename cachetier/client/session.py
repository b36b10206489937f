"""A session: what leases belong to. It lives as long as its watch connection, so a killed process gives all back."""

import os

from cachetier.client.client import Client
from cachetier.client.connection import Connection, request_bytes
from cachetier.core.errors import ProtocolError
from cachetier.core.messages import API_VERSION, OpenSession, OpenSessionReply


class Session:
    """An open session and the connection that keeps it.

    The server closes the session, and gives its leases back, as soon as that connection drops: at `close`, when this
    process dies, and when a child forked from it (which shares the socket) has died as well.

    Attributes:
        id: what later messages name.
        server: what the server said about itself.
    """

    def __init__(self, client: Client, name: str, engine: str, timeout_s: float) -> None:
        """Open a session for the process part `name` ("scheduler", "worker 0") of `engine`.

        Raises:
            UnavailableError, ProtocolError: as `Client.call`.
        """
        message = OpenSession(client=name, engine=engine, pid=os.getpid())
        self.server: OpenSessionReply = client.call(message, timeout_s)
        self.id = self.server.session
        self._watch = Connection(client.socket_path)
        status = self._watch.send(request_bytes("GET", f"/v{API_VERSION}/session/{self.id}/watch"), timeout_s)
        if status != 200:
            self._watch.close()
            raise ProtocolError(f"the server does not let session {self.id} be watched", status)

    def is_open(self) -> bool:
        """Tell whether the server still keeps the session. Never waits; False as soon as the server is gone.

        A server that is stopped (SIGSTOP) keeps its connections: only a call's deadline tells that.
        """
        return self._watch.is_open()

    def close(self) -> None:
        """Close the session: its leases are given back, what it was filling is dropped."""
        self._watch.close()
