"""What an engine or a tool uses to talk to a server: calls, a session, the mapped arena, a private server.

Everything here is synchronous; a `Client` belongs to one thread at a time. Nothing here imports the server's side.
"""

from cachetier.client.arena_view import ArenaView
from cachetier.client.client import Client
from cachetier.client.private_server import ServerHandle, ensure_server, expected_socket
from cachetier.client.session import Session

__all__ = ["ArenaView", "Client", "ServerHandle", "Session", "ensure_server", "expected_socket"]
